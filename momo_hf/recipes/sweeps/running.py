"""The work of one process: it runs points of a sweep, every one once, until all have been run."""

import contextlib
import gc
import json
import logging
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from optuna.trial import Trial

from momo_hf.optim.steps.search import AUTO
from momo_hf.recipes.sweeps import queue
from momo_hf.recipes.sweeps.config import Sweep, searches


logger = logging.getLogger(__name__)

HISTORY = ("step", "loss", "momo/effective_lr")


def work(sweep: Sweep, worker: int) -> None:
    """Take runs from all studies until none is left, or running elsewhere; workers start with different optimizers."""
    main = runpy.run_path(sweep.script, run_name="sweep")["main"]
    names = list(sweep.optimizers)
    turn = worker % len(names)
    studies = {name: sweep.study(name) for name in names[turn:] + names[:turn]}
    queue.work(studies, sweep.points, lambda name, trial, _: run_trial(sweep, name, main, trial))


def run_trial(sweep: Sweep, name: str, main: Callable[[list[str]], Any], trial: Trial) -> float:
    """One run of the task; returns its metric, or the worst value if it diverged or crashed, which is noted."""
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
        trial.set_user_attr("more_metrics", {name: results["metrics"].get(name) for name in sweep.more_metrics})
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
