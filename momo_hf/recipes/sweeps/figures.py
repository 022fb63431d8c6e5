"""The figure of a sweep, in the style of the paper: the final value against the learning rate, and what lies behind."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from momo_hf.recipes.sweeps.config import Sweep, searches
from momo_hf.recipes.sweeps.results import averages


COLORS = matplotlib.color_sequences["tab10"]
CURVES = 5  # more cannot be told apart
LINE = 0.06  # of the height of a panel, for a label beside it


def plot_sweep(sweep: Sweep, runs: pd.DataFrame) -> list[Path]:
    """Draw a sweep and write it as PNG and SVG.

    Args:
        sweep: what was run.
        runs: from `collect`.

    Returns:
        The paths of the files.
    """
    directions = {sweep.metric: sweep.direction, **sweep.more_metrics}
    figure = Figure(figsize=(9 + 6 * len(directions), 5), dpi=80, layout="constrained")
    *finals, curves, steps = figure.subplots(1, len(directions) + 2, width_ratios=[1.3] * len(directions) + [1, 1])
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(sweep.optimizers)}
    means = averages(sweep, runs)
    best = _best_lrs(sweep, means)
    searching = {name for name, options in sweep.optimizers.items() if searches(options)}
    for final, (metric, direction) in zip(finals, directions.items()):
        draw_final_values(final, averages(sweep, runs, metric), colors, searching, direction == "minimize")
        final.set(ylabel=metric, title="final value")
    _curves(curves, runs, best, colors, "loss")
    curves.set(ylabel="training loss", title=f"training of the best {len(curves.lines)}, at their best lr")
    _curves(steps, runs, best, colors, "momo/effective_lr")
    steps.set(ylabel="effective step size", title="step sizes of the MoMo methods")
    for axes in (*finals, curves, steps):
        axes.grid(alpha=0.3)
    # One legend for all, under the axes, where it hides no curve.
    lines, names = finals[0].get_legend_handles_labels()
    labels = [f"{name}, best lr {best[name]:g}" if name in best else name for name in names]
    figure.legend(lines, labels, loc="outside lower center", ncols=min(5, len(names)), frameon=False)
    figure.suptitle(sweep.title or Path(sweep.config).stem)
    paths = [Path(sweep.output_dir) / f"sweep.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path)
    return paths


def draw_final_values(
    axes: Axes, means: pd.DataFrame, colors: dict[str, Any], searching: set[str], minimize: bool
) -> None:
    """Draw final values against the learning rate, a line and a band from least to greatest for each optimizer.

    Args:
        axes: to draw on.
        means: with the columns optimizer, learning_rate, mean (NaN where a run diverged), min and max.
        colors: of the optimizers, by name, in the order of the legend.
        searching: names of those that have no learning rate of their own.
        minimize: whether less is better.
    """
    shown = means["mean"].dropna()
    low, high = means["min"].min(), means["max"].max()
    if not len(shown):  # nothing has ended, or everything diverged
        low, high = 0.0, 1.0
    # Beyond the values at the start of training the scale says nothing, and would hide the rest.
    if minimize and len(shown):
        high = min(high, low + 4 * (shown.median() - low) + 1e-12)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    edge = high if minimize else low
    for name, color in colors.items():
        own = means[means["optimizer"] == name].sort_values("learning_rate")
        if name in searching and len(own):
            # At no learning rate of its own, so at all of them.
            axes.axhspan(own["min"].iloc[0], own["max"].iloc[0], color=color, alpha=0.15, linewidth=0)
            axes.axhline(own["mean"].iloc[0], color=color, label=f"{name} (searches)", linestyle="--")
            continue
        alone: dict[str, Any] = (
            {"marker": "*", "markersize": 13} if len(own) == 1 else {"marker": "o", "markersize": 4}
        )
        axes.plot(own["learning_rate"], own["mean"], color=color, label=name, **alone)
        axes.fill_between(own["learning_rate"], own["min"], own["max"], color=color, alpha=0.15, linewidth=0)
        bad = own[own["mean"].isna()]
        if len(bad):  # a line of no points that is not clipped counts as a point far outside
            axes.plot(bad["learning_rate"], [edge] * len(bad), "x", color=color, clip_on=False)
    axes.set(xscale="log", xlabel="learning rate (x: diverged)")


def _best_lrs(sweep: Sweep, means: pd.DataFrame) -> dict[str, float]:
    """The best lr of every optimizer, the best optimizer first."""
    ranked = means.dropna().sort_values("mean", ascending=sweep.direction == "minimize", kind="stable")
    return dict(ranked.groupby("optimizer", sort=False)["learning_rate"].first())


def _curves(axes: Axes, runs: pd.DataFrame, best: dict[str, float], colors: dict, key: str) -> None:
    """Draw what the best optimizers logged under `key`, each at its best lr and first seed."""
    for name, lr in best.items():
        found = runs[(runs["optimizer"] == name) & (runs["learning_rate"] == lr)].sort_values("seed")
        history = [entry for entry in found["history"].iloc[0] if key in entry]
        if history and len(axes.lines) < CURVES:
            axes.plot([e["step"] for e in history], [e[key] for e in history], color=colors[name], label=name)
    axes.set(xlabel="step", yscale="log")
    _label_ends(axes)


def _label_ends(axes: Axes) -> None:
    """Write the name of every line beside its end, apart from the others."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(
        (to_axes.transform(np.asarray(line.get_xydata())[-1])[1], number) for number, line in enumerate(axes.lines)
    )
    lowest = 0.0
    heights = []
    for below, (height, _) in enumerate(ends):
        room = LINE * (len(ends) - 1 - below)  # for those above
        heights.append(min(max(height, lowest), 1 - room))
        lowest = heights[-1] + LINE
    for height, (_, number) in zip(heights, ends):
        line = axes.lines[number]
        axes.annotate(
            str(line.get_label()),
            xy=(1, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=8,
            va="center",
        )
