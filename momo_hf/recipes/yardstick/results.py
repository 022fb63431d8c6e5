"""What came out: all runs, the best point of every rival, and how far that is from the first rival's."""

import json
import math

import pandas as pd

from momo_hf.recipes.sweeps.queue import finished, key
from momo_hf.recipes.yardstick.plan import MEASURES, Plan


POINT = ["learning_rate", "schedule"]


def collect(plan: Plan) -> pd.DataFrame:
    """One row per finished run and rival; a run that two rivals share stands under both.

    Returns:
        The columns task, batch_size, steps, rival, optimizer, arguments (JSON), learning_rate (NaN for the default),
        schedule, seed, outcome, loss and accuracy (NaN where there is none), cap, search_steps and seconds.
    """
    rows = []
    for task in plan.tasks:
        done = finished(plan.studies()[task.name])
        for rival in plan.rivals:
            for setting in rival.settings:
                points = (plan.point(task, setting, seed) for seed in plan.seeds)
                for point in (point for point in points if key(point) in done):
                    noted = done[key(point)].user_attrs
                    row = {"task": task.name, "batch_size": task.batch_size, "steps": point["steps"]}
                    row |= {"rival": rival.name, "optimizer": rival.optimizer}
                    row |= {
                        "arguments": json.dumps(rival.arguments),
                        **{name: point[name] for name in (*POINT, "seed")},
                    }
                    row |= {"outcome": noted["outcome"]}
                    ok = noted["outcome"] == "ok"
                    row |= {name: noted["measures"].get(name) if ok else None for name in MEASURES}
                    row |= {name: noted.get(name) for name in ("cap", "search_steps", "seconds")}
                    rows.append(row)
    numbers = ["learning_rate", *MEASURES, "cap", "search_steps", "seconds"]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float)) if rows else pd.DataFrame()


def best(plan: Plan, runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The best point of every rival for every task: of those with all seeds, the one with the best mean.

    Args:
        plan: of the runs.
        runs: from `collect`.
        measure: "loss" or "accuracy".

    Returns:
        A row for each task and rival, which are the index: learning_rate, schedule, and the mean as `value`, which is
        infinite where a seed diverged. Tasks without the measure have no rows, nor has a rival that is not ready.
    """
    sign = MEASURES[measure]
    measured = runs.groupby("task")[measure].transform(lambda values: values.notna().any())
    points = runs[measured].groupby(["task", "rival", *POINT], dropna=False, sort=False)[measure]
    table = points.agg(value=lambda values: values.mean(skipna=False), seeds="size").reset_index()
    table = table[table["seeds"] == len(plan.seeds)].drop(columns="seeds")
    table["value"] = table["value"].fillna(sign * math.inf)
    order = (sign * table["value"]).sort_values(kind="stable").index
    return table.loc[order].drop_duplicates(["task", "rival"]).set_index(["task", "rival"])


def ratios(plan: Plan, runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """How many times worse every rival is than the first one at its best: of losses the quotient, of accuracies its inverse.

    Returns:
        A row for each task that has the measure, a column for each rival but the first; infinite where it diverged, NaN
        where it is not ready, or the first one is not or diverged.
    """
    values = best(plan, runs, measure)["value"].unstack().reindex(columns=[rival.name for rival in plan.rivals])
    values = values.reindex([task.name for task in plan.tasks if task.name in values.index])
    first, others = values.iloc[:, 0], values.iloc[:, 1:]
    over_first = others.div(first, axis=0) if MEASURES[measure] > 0 else 1 / others.div(first, axis=0)
    over_first = over_first.mask(others.map(math.isinf), math.inf)
    over_first[~first.map(math.isfinite)] = math.nan
    return over_first


def by_loss(plan: Plan, runs: pd.DataFrame) -> pd.DataFrame:
    """Ratios of losses, for the tasks whose losses compare."""
    return ratios(plan, runs, "loss").drop([task.name for task in plan.tasks if task.by_accuracy], errors="ignore")


def by_accuracy_where_there_is(plan: Plan, runs: pd.DataFrame) -> pd.DataFrame:
    """Ratios of accuracies for classifiers, and of losses for all other tasks."""
    accuracies = ratios(plan, runs, "accuracy")
    return pd.concat([accuracies, ratios(plan, runs, "loss").drop(accuracies.index)])
