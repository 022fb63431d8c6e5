"""The work of one process: it runs what the plan wants, every run once, until all is done."""

import logging
import math
import time
from functools import lru_cache
from typing import Any

import torch
from optuna.trial import Trial
from transformers import set_seed

from momo_hf import MomoOptimizer
from momo_hf.recipes.sweeps import queue
from momo_hf.recipes.sweeps.queue import Point
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.loop import batches, fit
from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.rivals import make_optimizer
from momo_hf.recipes.yardstick.task import Task


logger = logging.getLogger(__name__)


def work(plan: Plan, worker: int) -> None:
    """Take runs of all tasks until none is left, or running elsewhere; workers start with different tasks."""
    torch.set_num_threads(1)
    tasks = {task.name: task for task in plan.tasks}
    studies = plan.studies()
    names = list(tasks)
    turn = worker % len(names)
    queue.work(
        {name: studies[name] for name in names[turn:] + names[:turn]},
        lambda name: plan.wanted(tasks[name], queue.finished(studies[name])),
        lambda name, trial, point: run_trial(plan, tasks[name], trial, point),
    )


def run_trial(plan: Plan, task: Task, trial: Trial, point: Point) -> float:
    """One run; returns the held-out loss, or infinity if the run diverged or crashed, which is noted."""
    shown = {name: point[name] for name in ("optimizer", "learning_rate", "schedule", "seed")}
    logger.info(f"==== {task.name}, {', '.join(map(str, shown.values()))}")
    start = time.perf_counter()
    results: dict[str, Any] = {"measures": {}}
    try:
        results = train(task, read(task, plan.places), point)
        loss = results["measures"]["loss"]
        outcome = "ok" if math.isfinite(loss) else "diverged"
    except Exception as error:
        logger.exception("The run crashed.")
        outcome = f"crashed: {type(error).__name__}: {error}"[:500]
    for name, value in {**results, "outcome": outcome, "seconds": time.perf_counter() - start}.items():
        trial.set_user_attr(name, value)
    return loss if outcome == "ok" else math.inf


@lru_cache(maxsize=1)
def read(task: Task, places: Places) -> Data:
    """The rows of the task that this process is at."""
    return task.read(places)


def train(task: Task, data: Data, point: Point) -> dict[str, Any]:
    """Train a model and measure it.

    Returns:
        `measures` of the task; with an optimizer that searches for its cap, `cap`, which is None where the run was too
        short to find it, and `search_steps`.
    """
    steps, seed = point["steps"], point["seed"]
    set_seed(seed)
    model = task.model(data)
    optimizer = make_optimizer(point, model)
    fit(model, optimizer, point["schedule"], batches(data, task.batch_size, steps, seed), task.loss, steps)
    with torch.no_grad():
        measures = {name: float(value) for name, value in task.held_out(model, data).items()}
    search = optimizer.search if isinstance(optimizer, MomoOptimizer) else None
    found = {} if search is None else {"cap": search.cap, "search_steps": search.steps}
    return {"measures": measures, **found}
