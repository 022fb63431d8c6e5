"""The figure of one task: its held-out loss against the learning rate, for every rival and schedule."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from momo_hf.recipes.sweeps.figures import COLORS, draw_final_values
from momo_hf.recipes.sweeps.results import over_seeds
from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.results import POINT
from momo_hf.recipes.yardstick.task import Task


def plot_grid(plan: Plan, runs: pd.DataFrame, task: Task, path: Path) -> Path:
    """Draw the losses of a task, mean and range over the seeds, and write them as PNG.

    Args:
        plan: of the runs.
        runs: from `collect`.
        task: one of the plan's.
        path: of the file.
    """
    own = runs[runs["task"] == task.name]
    means = over_seeds(own.groupby(["rival", *POINT], dropna=False, sort=False)["loss"])
    titles = {rival.name: rival.title for rival in plan.rivals}
    several = means.groupby("rival")["schedule"].transform("nunique") > 1
    means["optimizer"] = means["rival"].map(titles) + (", " + means["schedule"]).where(several, "")
    names = list(dict.fromkeys(means["optimizer"]))
    without = means["learning_rate"].isna()
    figure = Figure(figsize=(8, 5), dpi=80, layout="constrained")
    axes = figure.subplots()
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    draw_final_values(axes, means, colors, set(means[without]["optimizer"]), minimize=True)
    steps, seeds = own["steps"].max(), own["seed"].nunique()
    axes.set(ylabel="held-out loss", title=f"{task.title}, {steps} steps, {seeds} seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    return path
