"""The figure: how far every rival is from the first one at its best, a row of dots for each task."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.results import by_loss, ratios
from momo_hf.recipes.yardstick.tables import NEAR


MARKERS = "osvP^DX<>hp"
TICKS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2, 3, 5)
FURTHEST = 5.0  # beyond it the scale would hide the rest: such a dot lies at the edge


def plot(plan: Plan, runs: pd.DataFrame, path: Path) -> Path:
    """Draw the ratios of `results` and write them as PNG.

    Args:
        plan: of the runs.
        runs: from `collect`.
        path: of the file.
    """
    losses, accuracies = by_loss(plan, runs), ratios(plan, runs, "accuracy")
    tasks = {task.name: task for task in plan.tasks}
    shown = pd.concat([losses, accuracies.loc[[name for name in accuracies.index if tasks[name].by_accuracy]]])
    shown = shown.clip(upper=FURTHEST)
    figure = Figure(figsize=(9, 2.2 + 0.27 * len(shown)), dpi=80, layout="constrained")
    axes = figure.subplots()
    for number, rival in enumerate(plan.rivals[1:]):
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}", "markersize": 7}
        if rival is plan.rivals[-1]:  # what one wants to know about
            style |= {"marker": "*", "color": "black", "markersize": 15}
        label = f"{rival.label}: {_mean(losses[rival.name])}"
        axes.plot(shown[rival.name], range(len(shown)), label=label, linestyle="none", clip_on=False, **style)
    axes.axvspan(1 / NEAR, NEAR, color="green", alpha=0.08)
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.97 * min(1, shown.min(axis=None)) if shown.size else 0.97, max(1.2, 1.03 * axes.dataLim.x1))
    ticks = [tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" + ("+" if tick == FURTHEST else "") for tick in ticks])
    axes.set_xticks([], minor=True)
    named = [tasks[name].title + (", by accuracy" if tasks[name].by_accuracy else "") for name in shown.index]
    axes.set_yticks(range(len(named)), named)
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"held-out loss / that of {plan.rivals[0].label} (left of 1: better)")
    if len(plan.rivals) > 1:
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
    return path


def _mean(values: pd.Series) -> str:
    mean = values.mean(skipna=False)
    return "not ready" if math.isnan(mean) else "diverged" if math.isinf(mean) else f"mean {mean:.2f}"
