"""The tables of the README and of configs/sweeps/README.md, in Markdown."""

import math

import pandas as pd

from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.results import best, by_accuracy_where_there_is, by_loss, ratios


NEAR = 1.02  # within it a rival counts as good as the first one


def tables(plan: Plan, runs: pd.DataFrame) -> str:
    """All tables: the summary, and by task the losses and the accuracies.

    Args:
        plan: of the runs.
        runs: from `collect`.
    """
    parts = [summary(plan, runs)] if len(plan.rivals) > 1 else []
    parts += [table for table in (loss_table(plan, runs), accuracy_table(plan, runs)) if table]
    return "\n\n".join(parts)


def summary(plan: Plan, runs: pd.DataFrame) -> str:
    """Mean and worst ratio over the tasks, and on how many tasks a rival is as good as the first one."""
    losses, mixed = by_loss(plan, runs), by_accuracy_where_there_is(plan, runs)
    rows = {f"mean of {len(losses)}, by loss": losses.mean(skipna=False), "worst": losses.max(skipna=False)}
    if len(ratios(plan, runs, "accuracy")):
        rows[f"mean of {len(mixed)}, classifiers by accuracy"] = mixed.mean(skipna=False)
    table = {name: [_ratio(value, 2) for value in values] for name, values in rows.items()}
    table[f"within {NEAR - 1:.0%}, of {len(mixed)}"] = list((mixed <= NEAR).sum())
    columns = [rival.label for rival in plan.rivals[1:]]
    return _markdown(pd.DataFrame.from_dict(table, "index", columns=columns), f"over {plan.rivals[0].label}")


def loss_table(plan: Plan, runs: pd.DataFrame) -> str:
    """The best point of the first rival by task, how far the others are from it, and the caps that were found."""
    points, shown = best(plan, runs, "loss"), by_loss(plan, runs)
    table = pd.DataFrame(index=shown.index)
    first = plan.rivals[0]
    table[f"{first.label}: loss, lr, schedule"] = [
        _point(points, task, first.name, "{:.4g}, ") for task in shown.index
    ]
    for rival in plan.rivals[1:]:
        table[rival.label] = [_ratio(value, 3) for value in shown[rival.name]]
    for rival in plan.rivals:
        caps = runs[(runs["rival"] == rival.name) & runs["cap"].notna()].groupby("task")["cap"]
        if len(caps):
            found = caps.agg(lambda values: f"{values.min():.1e} to {values.max():.1e}")
            table[f"cap found by {rival.label}"] = found.reindex(shown.index, fill_value="-")
    return _markdown(table.rename(index=_titles(plan)), "task") if len(table) else ""


def accuracy_table(plan: Plan, runs: pd.DataFrame) -> str:
    """The accuracy of every rival, in percent, for the tasks that have one."""
    points, tasks = best(plan, runs, "accuracy"), ratios(plan, runs, "accuracy").index
    first, *others = plan.rivals
    table = pd.DataFrame(index=tasks)
    table[f"{first.label}: lr, schedule"] = [_point(points, task, first.name, "{:.1%}: ") for task in tasks]
    for rival in others:
        table[rival.label] = [_point(points, task, rival.name, "{:.1%}", setting=False) for task in tasks]
    return _markdown(table.rename(index=_titles(plan)), "accuracy") if len(table) else ""


def _titles(plan: Plan) -> dict[str, str]:
    return {task.name: task.title for task in plan.tasks}


def _point(points: pd.DataFrame, task: str, rival: str, number: str, setting: bool = True) -> str:
    if (task, rival) not in points.index:
        return "not ready"
    point = points.loc[(task, rival)]
    if math.isinf(point["value"]):
        return "diverged"
    lr = "default" if math.isnan(point["learning_rate"]) else f"{point['learning_rate']:g}"
    return number.format(point["value"]) + (f"{lr}, {point['schedule']}" if setting else "")


def _ratio(value: float, digits: int) -> str:
    return "not ready" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:.{digits}f}"


def _markdown(table: pd.DataFrame, corner: str) -> str:
    return table.rename_axis(corner).to_markdown(disable_numparse=True)
