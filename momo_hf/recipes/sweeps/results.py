"""What came out of a sweep: finished runs, averages over seeds, and the table."""

import math

import optuna
import pandas as pd
from pandas.api.typing import SeriesGroupBy

from momo_hf.recipes.sweeps.config import Sweep, default_lr
from momo_hf.recipes.sweeps.queue import finished, key


def number_finished(sweep: Sweep, studies: dict[str, optuna.Study]) -> int:
    """How many points of the grids have a result."""
    done = {name: finished(study) for name, study in studies.items()}
    return sum(key(point) in done[name] for name in studies for point in sweep.points(name))


def collect(sweep: Sweep) -> pd.DataFrame:
    """One row per finished run: optimizer, learning_rate, seed, metrics (NaN if there is none), outcome, seconds, history."""
    rows = []
    for name in sweep.optimizers:
        done = finished(sweep.study(name))
        for point in sweep.points(name):
            if key(point) in done:
                trial = done[key(point)]
                attrs = trial.user_attrs
                ok = attrs["outcome"] == "ok"
                more = attrs.get("more_metrics", {}) if ok else {}
                rows.append(
                    {
                        "optimizer": name,
                        **point,
                        sweep.metric: trial.value if ok else math.nan,
                        **{metric: more.get(metric, math.nan) for metric in sweep.more_metrics},
                        "outcome": attrs["outcome"],
                        "seconds": attrs.get("seconds"),
                        "history": attrs.get("history", []),
                    }
                )
    return pd.DataFrame(rows)


def averages(sweep: Sweep, runs: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Mean, least and greatest value over the seeds of every optimizer and learning rate; NaN if a seed diverged.

    Args:
        sweep: of the runs.
        runs: from `collect`.
        metric: one of `more_metrics`; default: the sweep's.
    """
    return over_seeds(runs.groupby(["optimizer", "learning_rate"], sort=False)[metric or sweep.metric])


def over_seeds(groups: SeriesGroupBy) -> pd.DataFrame:
    """Mean (NaN if a value is), least and greatest value of every group, beside what it was made by."""
    return groups.agg([("mean", lambda values: values.mean(skipna=False)), "min", "max"]).reset_index()


def summary(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per optimizer: best value and lr, decades of lr near the best of all, the value at the default lr.

    The decades are the length, on the log axis, of the pieces between neighbouring points of the grid whose means both
    lie within 5 % or 10 % of the best mean over all optimizers.
    """
    means = averages(sweep, runs)
    minimize = sweep.direction == "minimize"
    best = means["mean"].min() if minimize else means["mean"].max()
    rows = []
    for name in sweep.optimizers:
        own = means[means["optimizer"] == name].sort_values("learning_rate")
        at_default = own[own["learning_rate"] == default_lr(sweep.optimizers[name])]["mean"]
        row = {"optimizer": name, "best value": math.nan, "best lr": math.nan}
        if own["mean"].notna().any():
            top = own.loc[own["mean"].idxmin() if minimize else own["mean"].idxmax()]
            row |= {"best value": top["mean"], "best lr": top["learning_rate"]}
            at_best = runs[(runs["optimizer"] == name) & (runs["learning_rate"] == top["learning_rate"])]
            row |= {f"{metric} there": at_best[metric].mean(skipna=False) for metric in sweep.more_metrics}
        for share in (0.05, 0.1):
            near = (own["mean"] - best).abs() <= share * abs(best)
            row[f"decades within {share:.0%}"] = decades(own["learning_rate"].tolist(), near.tolist())
        row["default lr"] = default_lr(sweep.optimizers[name])
        row["value at default lr"] = at_default.iloc[0] if len(at_default) else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def decades(grid: list[float], near: list[bool]) -> float:
    """The length on the log axis of the pieces of a sorted grid whose ends are both near the best."""
    pairs = zip(zip(grid, near), zip(grid[1:], near[1:]))
    return sum(math.log10(b / a) for (a, near_a), (b, near_b) in pairs if near_a and near_b)
