"""Several finished sweeps beside each other: how far every optimizer is from the best AdamW of its grid."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from momo_hf.recipes.sweeps.config import default_lr, load_sweep
from momo_hf.recipes.sweeps.results import averages, collect


REFERENCES = ("adamw", "adamw_linear")
MARKERS = "osD^v<>phX"
EQUAL = 2  # percent: within it an optimizer counts as good as the best AdamW, and the axis is linear
TICKS = (-50, -20, -5, -2, 0, 2, 5, 20, 100, 500)


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
    """Draw the rows of `compare` for several sweeps, one task below the other."""
    tasks, names = list(dict.fromkeys(rows["task"])), list(dict.fromkeys(rows["optimizer"]))
    figure = Figure(figsize=(10, 1.2 + 0.09 * len(tasks) * (len(names) + 2)), dpi=90, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        color, marker = matplotlib.color_sequences["tab10"][number % 10], MARKERS[number % len(MARKERS)]
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6, "linestyle": "none"}
        axes.plot([], [], label=name, **style)
        for _, row in rows[rows["optimizer"] == name].iterrows():
            at = tasks.index(row["task"]) + (number + 1.5) / (len(names) + 2) - 0.5
            default, best = row["% worse than best AdamW"], row["% worse"]
            axes.plot([default, best], [at, at], color=color, linewidth=1, alpha=0.5)
            axes.plot(best, at, markerfacecolor="white", **style)
            axes.plot(default, at, **style)
    axes.axvspan(-EQUAL, EQUAL, color="green", alpha=0.08)
    axes.set_xscale("symlog", linthresh=EQUAL, linscale=0.7)
    left, right = axes.dataLim.intervalx
    axes.set_xlim(min(1.3 * left, -EQUAL) - 0.5, 1.3 * right + 0.5)
    ticks = [tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    for boundary in range(1, len(tasks)):
        axes.axhline(boundary - 0.5, color="0.8", linewidth=0.8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("% worse than the best AdamW of the grid (left of 0: better)")
    both = [
        Line2D([], [], color="0.3", marker="o", linestyle="none", label="at the default lr"),
        Line2D([], [], color="0.3", marker="o", linestyle="none", markerfacecolor="white", label="at the best lr"),
    ]
    handles = [*axes.get_legend_handles_labels()[0], *both]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path)
