"""A learning-rate sweep: a task, optimizers, learning rates and seeds, run by optuna."""

import contextlib
import dataclasses
import gc
import inspect
import json
import logging
import math
import runpy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import optuna
import pandas as pd
from accelerate.state import AcceleratorState, GradientState
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import Trainer, TrainingArguments

from momo_hf.config_file import read_config, unknown_name
from momo_hf.errors import InputError


logger = logging.getLogger(__name__)
# Heartbeats are what lets a sweep go on after a worker was killed; optuna has called them experimental since 2021.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

HEARTBEAT = 30  # seconds; a trial that is silent for four of them is given to another worker
OPEN = (TrialState.WAITING, TrialState.RUNNING)
HOLDING = (*OPEN, TrialState.COMPLETE)  # states of a trial whose point no other one may take
HISTORY = ("step", "loss", "momo/effective_lr")


@dataclass
class Sweep:
    """What a file in configs/sweeps holds.

    Args:
        script: the task's script, with a `main(argv)` that writes results.json.
        config: the task's config file.
        output_dir: folder of runs, storage, table and figures.
        metric: a number of results.json.
        optimizers: by name, the arguments that make each one (`optim`, `optim_args`, a schedule, ...), and with
            `learning_rates` a grid of its own; an empty grid means the optimizer's default alone.
        learning_rates: the grid of all others.
        seeds: of each point.
        arguments: for every run, on top of the config.
        direction: "minimize" or "maximize".
        workers: runs at once.
        storage: optuna's; default: sqlite in the output folder.
        title: of the figure.
    """

    script: str
    config: str
    output_dir: str
    metric: str
    optimizers: dict[str, dict[str, Any]]
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    arguments: dict[str, Any] = field(default_factory=dict)
    direction: str = "minimize"
    workers: int = 2
    storage: str | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"`direction` must be 'minimize' or 'maximize', got {self.direction!r}.")
        for path in (self.script, self.config):
            if not Path(path).is_file():
                raise ValueError(f"The sweep names {path}, which does not exist.")
        self.grids = {name: self._grid(options) for name, options in self.optimizers.items()}

    def _grid(self, options: dict[str, Any]) -> list[float]:
        grid = options.get("learning_rates", self.learning_rates)
        if not _fits(grid, list[float]):
            raise ValueError(f"`learning_rates` must be a list of numbers, such as [1e-3, 1e-2], got {grid!r}.")
        return sorted({*map(float, grid), default_lr(options)})

    @property
    def number_of_runs(self) -> int:
        return sum(map(len, self.grids.values())) * len(self.seeds)

    def study(self, optimizer: str) -> optuna.Study:
        """The study of one optimizer; created if it is not there, continued if it is."""
        Path(self.output_dir).mkdir(parents=True, exist_ok=True)
        url = self.storage or f"sqlite:///{self.output_dir}/sweep.sqlite3"
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 100}} if url.startswith("sqlite") else None,
            heartbeat_interval=HEARTBEAT,
            grace_period=4 * HEARTBEAT,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
        return optuna.create_study(
            study_name=optimizer, storage=storage, direction=self.direction, load_if_exists=True
        )

    @property
    def worst(self) -> float:
        return math.inf if self.direction == "minimize" else -math.inf


def load_sweep(path: str | Path, **changes: Any) -> Sweep:
    """Read a sweep from a YAML file; `changes` go on top, where they are not None.

    Raises:
        InputError: a name is unknown or missing, a value has the wrong type, or a file is missing.
    """
    values, lines = read_config(path)
    fields = {field.name: field for field in dataclasses.fields(Sweep)}
    for name, value in values.items():
        if name not in fields:
            raise InputError(unknown_name(str(name), fields), path, lines[name])
        if not _fits(value, fields[name].type):
            kind = fields[name].type
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise InputError(f"{name!r} must be of the type {wanted}, got {value!r}", path, lines[name])
    missing = [f.name for f in fields.values() if f.default is f.default_factory and f.name not in values]
    if missing:
        raise InputError(f"needs {', '.join(missing)} too", path)
    try:
        return Sweep(**values | {name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise InputError(str(error), path) from error


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    return kind is Any or isinstance(value, int | float if kind is float else kind)


def default_lr(options: dict[str, Any]) -> float:
    """The default of the optimizer's class for `lr`, by the arguments that make the optimizer."""
    made = {key: value for key, value in options.items() if key in ("optim", "optim_args")}
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", report_to=[], use_cpu=True, **made))
    return float(inspect.signature(cls).parameters["lr"].default)


# ---- Running ----


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
    while True:
        for name, study in studies.items():
            while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.optimize(lambda trial, name=name: run_trial(sweep, name, main, trial), n_trials=1)
            optuna.storages.fail_stale_trials(study)
        if not any(point(t) for study in studies.values() for t in study.get_trials(deepcopy=False, states=OPEN)):
            return
        time.sleep(1)  # if the worker of one of them dies, it comes back into the queue


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
    options = {**sweep.arguments, **options, "learning_rate": lr, "seed": seed, "output_dir": str(folder)}
    options["overwrite_output_dir"] = True  # what is there is of a run that was interrupted
    return [sweep.config, *(f"--{key}={value}" for key, value in options.items())]


def shorten(history: list[dict[str, float]], points: int = 200) -> list[dict[str, float]]:
    """At most so many entries of a run's log that hold a loss, with what the figure shows."""
    logged = [{k: e[k] for k in HISTORY if k in e} for e in history if "loss" in e]
    return logged[:: max(1, math.ceil(len(logged) / points))]


# ---- Results ----


def finished(study: optuna.Study) -> dict[tuple[float, int], FrozenTrial]:
    """The last finished trial of every learning rate and seed."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {(t.params["learning_rate"], t.params["seed"]): t for t in trials}


def number_finished(sweep: Sweep, studies: dict[str, optuna.Study]) -> int:
    """How many points of the grids have a result."""
    return sum(
        lr in sweep.grids[name] and seed in sweep.seeds
        for name, study in studies.items()
        for lr, seed in finished(study)
    )


def collect(sweep: Sweep) -> pd.DataFrame:
    """One row per finished run: optimizer, learning_rate, seed, value (NaN if there is none), outcome, seconds, history."""
    rows = []
    for name in sweep.optimizers:
        for (lr, seed), trial in sorted(finished(sweep.study(name)).items()):
            attrs = trial.user_attrs
            if lr in sweep.grids[name] and seed in sweep.seeds:
                ok = attrs["outcome"] == "ok"
                rows.append(
                    {
                        "optimizer": name,
                        "learning_rate": lr,
                        "seed": seed,
                        sweep.metric: trial.value if ok else math.nan,
                        "outcome": attrs["outcome"],
                        "seconds": attrs.get("seconds"),
                        "history": attrs.get("history", []),
                    }
                )
    return pd.DataFrame(rows)


def averages(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, least and greatest value over the seeds of every optimizer and learning rate; NaN if a seed diverged."""
    groups = runs.groupby(["optimizer", "learning_rate"], sort=False)[sweep.metric]
    table = groups.agg([("mean", lambda v: v.mean(skipna=False)), "min", "max"]).reset_index()
    return table


def summary(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per optimizer: best value and lr, decades of lr near the best of all, the value at the default lr.

    The decades are the length, on the log axis, of the pieces between neighbouring points of the grid whose means both
    lie within 5 % or 10 % of the best mean over all optimizers.
    """
    means = averages(sweep, runs)
    minimize = sweep.direction == "minimize"
    best = means["mean"].min() if minimize else means["mean"].max()
    rows = []
    for name in sweep.optimizers:
        own = means[means["optimizer"] == name].sort_values("learning_rate")
        at_default = own[own["learning_rate"] == default_lr(sweep.optimizers[name])]["mean"]
        row = {"optimizer": name, "best value": math.nan, "best lr": math.nan}
        if own["mean"].notna().any():
            top = own.loc[own["mean"].idxmin() if minimize else own["mean"].idxmax()]
            row |= {"best value": top["mean"], "best lr": top["learning_rate"]}
        for share in (0.05, 0.1):
            near = (own["mean"] - best).abs() <= share * abs(best)
            row[f"decades within {share:.0%}"] = decades(own["learning_rate"].tolist(), near.tolist())
        row["default lr"] = default_lr(sweep.optimizers[name])
        row["value at default lr"] = at_default.iloc[0] if len(at_default) else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def decades(grid: list[float], near: list[bool]) -> float:
    """The length on the log axis of the pieces of a sorted grid whose ends are both near the best."""
    pairs = zip(zip(grid, near), zip(grid[1:], near[1:]))
    return sum(math.log10(b / a) for (a, near_a), (b, near_b) in pairs if near_a and near_b)
