"""The figure of a sweep, in the style of the paper: the final value against the learning rate, and what lies behind."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from momo_hf.recipes.sweeps.config import Sweep
from momo_hf.recipes.sweeps.results import averages


COLORS = plt.get_cmap("tab10").colors
CURVES = 3


def plot_sweep(sweep: Sweep, runs: pd.DataFrame) -> list[Path]:
    """Draw a sweep and write it as PNG and SVG.

    Args:
        sweep: what was run.
        runs: from `collect`.

    Returns:
        The paths of the files.
    """
    figure, (final, curves, steps) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=[1.3, 1, 1])
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(sweep.optimizers)}
    means = averages(sweep, runs)
    _final_values(final, sweep, means, colors)
    best = _best_lrs(sweep, means)
    _training_curves(curves, runs, best, colors)
    _step_sizes(steps, runs, best, colors)
    figure.suptitle(sweep.title or Path(sweep.config).stem)
    figure.tight_layout()
    paths = [Path(sweep.output_dir) / f"sweep.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=80)
    plt.close(figure)
    return paths


def _final_values(axes, sweep: Sweep, means: pd.DataFrame, colors: dict) -> None:
    shown = means["mean"].dropna()
    low, high = means["min"].min(), means["max"].max()
    # Beyond the values at the start of training the scale says nothing, and would hide the rest.
    if sweep.direction == "minimize" and len(shown):
        high = min(high, low + 4 * (shown.median() - low) + 1e-12)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    edge = high if sweep.direction == "minimize" else low
    for name, color in colors.items():
        own = means[means["optimizer"] == name].sort_values("learning_rate")
        alone = {"marker": "*", "markersize": 13} if len(own) == 1 else {"marker": "o", "markersize": 4}
        axes.plot(own["learning_rate"], own["mean"], color=color, label=name, **alone)
        axes.fill_between(own["learning_rate"], own["min"], own["max"], color=color, alpha=0.15, linewidth=0)
        bad = own[own["mean"].isna()]
        axes.plot(bad["learning_rate"], [edge] * len(bad), "x", color=color, clip_on=False)
    axes.set(xscale="log", xlabel="learning rate (x: diverged)", ylabel=sweep.metric)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _best_lrs(sweep: Sweep, means: pd.DataFrame) -> dict[str, list[float]]:
    ranked = means.dropna().sort_values("mean", ascending=sweep.direction == "minimize")
    return {name: list(part["learning_rate"].head(CURVES)) for name, part in ranked.groupby("optimizer", sort=False)}


def _curves(axes, runs: pd.DataFrame, best: dict, colors: dict, key: str) -> None:
    for name, lrs in best.items():
        for rank, lr in enumerate(lrs):
            found = runs[(runs["optimizer"] == name) & (runs["learning_rate"] == lr)].sort_values("seed")
            history = [entry for entry in found["history"].iloc[0] if key in entry]
            if history:
                style = {"color": colors[name], "alpha": 1 - 0.3 * rank, "linestyle": ("-", "--", ":")[rank]}
                label = f"{name}, {lr:g}" if rank == 0 else None
                axes.plot([e["step"] for e in history], [e[key] for e in history], label=label, **style)
    axes.set(xlabel="step", yscale="log")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _training_curves(axes, runs: pd.DataFrame, best: dict, colors: dict) -> None:
    _curves(axes, runs, best, colors, "loss")
    axes.set(ylabel="training loss", title=f"best {CURVES} learning rates (-, --, :), first seed")


def _step_sizes(axes, runs: pd.DataFrame, best: dict, colors: dict) -> None:
    _curves(axes, runs, best, colors, "momo/effective_lr")
    axes.set(ylabel="effective step size", title="of the MoMo methods")
