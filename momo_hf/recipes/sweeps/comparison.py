"""Several finished sweeps beside each other: how far every optimizer is from the best AdamW of its grid."""

import math
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from momo_hf.recipes.sweeps.config import default_lr, load_sweep
from momo_hf.recipes.sweeps.results import averages, collect


REFERENCES = ("adamw", "adamw_linear")


def compare(path: str, output_dir: str | None) -> list[dict]:
    """One row per optimizer of a sweep: its value at the default lr and at its best one, in percent worse than AdamW."""
    sweep = load_sweep(path)
    if output_dir is not None:
        sweep = load_sweep(path, output_dir=f"{output_dir}/{Path(path).stem}")
    means = averages(sweep, collect(sweep))
    sign = 1 if sweep.direction == "minimize" else -1
    best = {name: sign * (sign * part["mean"]).min() for name, part in means.groupby("optimizer", sort=False)}
    reference = sign * min(sign * best[name] for name in REFERENCES if name in best)

    def worse(value: float) -> float:
        return 100 * sign * (value - reference) / abs(reference)

    rows = []
    for name, value in best.items():
        own = means[(means["optimizer"] == name) & (means["learning_rate"] == default_lr(sweep.optimizers[name]))]
        at_default = own["mean"].iloc[0] if len(own) else math.nan
        row = {"task": Path(path).stem, "metric": sweep.metric, "optimizer": name, "at default lr": at_default}
        row |= {"% worse than best AdamW": worse(at_default), "at best lr": value, "% worse": worse(value)}
        rows.append(row)
    return rows


def plot_comparison(rows: pd.DataFrame, path: Path) -> None:
    """Draw the rows of `compare` for several sweeps, one task beside the other."""
    tasks, names = list(dict.fromkeys(rows["task"])), list(dict.fromkeys(rows["optimizer"]))
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for number, name in enumerate(names):
        own = rows[rows["optimizer"] == name].set_index("task")
        shift = (number - len(names) / 2) * 0.08
        there = [task for task in tasks if task in own.index]
        at = [tasks.index(task) + shift for task in there]
        color = plt.get_cmap("tab10").colors[number % 10]
        axes.plot(at, own.loc[there, "% worse than best AdamW"], "o", color=color, label=f"{name}, default lr")
        axes.plot(at, own.loc[there, "% worse"], "_", color=color, markersize=9)
    axes.axhspan(-100, 2, color="green", alpha=0.08)
    axes.set_yscale("symlog", linthresh=2)
    axes.set(xticks=range(len(tasks)), xticklabels=tasks, ylabel="% worse than the best AdamW (-: at the best lr)")
    axes.set_ylim(bottom=-20)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
