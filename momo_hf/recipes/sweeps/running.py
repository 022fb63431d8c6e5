"""The work of one process: it takes points of a sweep, every one once, until all have been run."""

import contextlib
import functools
import gc
import json
import logging
import math
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from accelerate.state import AcceleratorState, GradientState
from optuna.trial import FrozenTrial, Trial, TrialState

from momo_hf.optim.steps.search import AUTO
from momo_hf.recipes.sweeps.config import SharedStudy, Sweep, searches


logger = logging.getLogger(__name__)

OPEN = (TrialState.WAITING, TrialState.RUNNING)
HOLDING = (*OPEN, TrialState.COMPLETE)  # states of a trial whose point no other one may take
HISTORY = ("step", "loss", "momo/effective_lr")


def reserve(sweep: Sweep, name: str, study: optuna.Study) -> None:
    """Queue every point of an optimizer's grid that no trial of its study holds yet.

    The queue is what makes a point run once: optuna hands a waiting trial to one worker, while its samplers, the one for
    grids included, can give two workers the same point. Two that fill the queue at once may queue a point twice; of
    these the trial with the lower number holds it, see `holds_its_point`.
    """
    held = {point(trial) for trial in study.get_trials(deepcopy=False, states=HOLDING)}
    for lr in sweep.grids[name]:
        for seed in sweep.seeds:
            if (lr, seed) not in held:
                study.enqueue_trial({"learning_rate": lr, "seed": seed})


def point(trial: FrozenTrial) -> tuple[float, int] | None:
    """Learning rate and seed that a trial has, or is queued for."""
    params = trial.system_attrs.get("fixed_params", trial.params)
    return (params["learning_rate"], params["seed"]) if {"learning_rate", "seed"} <= set(params) else None


def holds_its_point(study: optuna.Study, number: int) -> bool:
    """Whether a trial has a point that no earlier one waits for, runs or has run. Numbers are given out one by one."""
    trials = study.get_trials(deepcopy=False)
    mine = next(point(trial) for trial in trials if trial.number == number)
    earlier = (point(trial) for trial in trials if trial.number < number and trial.state in HOLDING)
    return mine is not None and mine not in earlier


def work(sweep: Sweep, worker: int) -> None:
    """Take runs from all studies until none is left, or running elsewhere; workers start with different optimizers."""
    main = runpy.run_path(sweep.script, run_name="sweep")["main"]
    names = list(sweep.optimizers)
    turn = worker % len(names)
    studies = {name: sweep.study(name) for name in names[turn:] + names[:turn]}
    for name, study in studies.items():
        reserve(sweep, name, study)
    seen: set[int] = set()
    while True:
        for name, study in studies.items():
            while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.optimize(functools.partial(run_trial, sweep, name, main), n_trials=1)
            requeue_lost(study, seen)
        if not any(point(t) for study in studies.values() for t in study.get_trials(deepcopy=False, states=OPEN)):
            return
        time.sleep(1)  # if the worker of one of them dies, it comes back into the queue


def requeue_lost(study: SharedStudy, seen: set[int]) -> None:
    """Put the points of workers that are gone back into the queue.

    optuna looks for trials whose heartbeat is old, and a worker that is killed between taking a trial and its first
    heartbeat leaves one that has none. So whoever waits gives a trial one heartbeat, when it first sees it: a living
    worker renews it, that of a dead one grows old.

    Args:
        study: of one optimizer.
        seen: trials that this process has given one; they are added.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in seen:
            seen.add(trial._trial_id)
            study.record_heartbeat(trial)
    optuna.storages.fail_stale_trials(study)


def run_trial(sweep: Sweep, name: str, main: Callable[[list[str]], Any], trial: Trial) -> float:
    """One run of the task; returns its metric, or the worst value if it diverged or crashed, which is noted.

    Raises:
        TrialPruned: there is nothing to run: another worker was quicker.
    """
    if not holds_its_point(trial.study, trial.number):
        raise optuna.TrialPruned
    lr = trial.suggest_float("learning_rate", 1e-20, 1e20, log=True)
    seed = trial.suggest_int("seed", 0, 2**31)
    folder = Path(sweep.output_dir) / "runs" / name / f"lr{lr:g}-seed{seed}"
    logger.info(f"==== {name}, lr {lr:g}, seed {seed}")
    try:
        with contextlib.redirect_stdout(None):
            main(command(sweep, name, lr, seed, folder))
        results = json.loads((folder / "results.json").read_text("utf-8"))
        value = results["metrics"].get(sweep.metric)
        outcome = "ok" if value is not None and math.isfinite(value) else "diverged"
        trial.set_user_attr("history", shorten(results.get("history", [])))
        trial.set_user_attr("seconds", results["seconds"])
    except Exception as error:
        logger.exception("The run crashed.")
        value, outcome = None, f"crashed: {type(error).__name__}: {error}"[:500]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()
    trial.set_user_attr("outcome", outcome)
    return float(value) if outcome == "ok" else sweep.worst


def command(sweep: Sweep, name: str, lr: float, seed: int, folder: Path) -> list[str]:
    """The arguments of one run of the script."""
    options = {key: value for key, value in sweep.optimizers[name].items() if key != "learning_rates"}
    if searches(options):  # whatever learning rate the config has
        options["optim_args"] = ",".join(filter(None, (options.get("optim_args"), f"lr={AUTO}")))
    else:
        options["learning_rate"] = lr
    options = {**sweep.arguments, **options, "seed": seed, "output_dir": str(folder)}
    options["overwrite_output_dir"] = True  # what is there is of a run that was interrupted
    return [sweep.config, *(f"--{key}={value}" for key, value in options.items())]


def shorten(history: list[dict[str, float]], points: int = 200) -> list[dict[str, float]]:
    """At most so many entries of a run's log that hold a loss, with what the figure shows."""
    logged = [{k: e[k] for k in HISTORY if k in e} for e in history if "loss" in e]
    return logged[:: max(1, math.ceil(len(logged) / points))]
