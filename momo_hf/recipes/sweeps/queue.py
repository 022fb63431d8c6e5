"""Points that are run once each, by any number of workers: studies of optuna as queues that outlive a kill.

A point is what one run is made of, a dict of JSON values. Two that are equal are one run.
"""

import functools
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from momo_hf.recipes.errors import InputError


logger = logging.getLogger(__name__)

# Heartbeats are what lets a sweep go on after a worker was killed; optuna has called them experimental since 2021.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

HEARTBEAT = 30  # seconds; a trial that is silent for four of them is given to another worker
OPEN = (TrialState.WAITING, TrialState.RUNNING)
HOLDING = (*OPEN, TrialState.COMPLETE)  # states of a trial whose point no other one may take

Point = dict[str, Any]


class SharedStudy(optuna.Study):
    """A study from which workers take trials one at a time: SQLite has no lock on a row that is taken.

    Args:
        name: of the study, which is there.
        storage: that it is in.
        lock: what its workers share.
    """

    def __init__(self, name: str, storage: RDBStorage, lock: FileLock) -> None:
        super().__init__(name, storage)
        self._database, self._one_at_a_time = storage, lock

    def _pop_waiting_trial_id(self) -> int | None:
        with self._one_at_a_time:
            return super()._pop_waiting_trial_id()

    def record_heartbeat(self, trial: FrozenTrial) -> None:
        """Say that somebody works on a trial, as a worker does by itself every `HEARTBEAT` seconds."""
        self._database.record_heartbeat(trial._trial_id)


class Queue:
    """The studies of one folder.

    Args:
        folder: of the storage, and of the lock that workers on one machine share.
        storage: optuna's, a URL; default: sqlite in the folder, under `name`.
        name: of the two files.
        direction: "minimize" or "maximize".

    Raises:
        InputError: the storage cannot be opened.
    """

    def __init__(self, folder: str | Path, storage: str | None, name: str, direction: str = "minimize") -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Workers start at the same moment, and SQLite has no lock on a table that is made.
        self._one_at_a_time = FileLock(f"{folder}/{name}.lock")
        self._direction = StudyDirection[direction.upper()]
        with self._one_at_a_time:
            self._storage = _open(storage or f"sqlite:///{folder}/{name}.sqlite3")

    def study(self, name: str) -> SharedStudy:
        """A study by its name; created if it is not there, continued if it is."""
        with self._one_at_a_time:
            optuna.create_study(study_name=name, storage=self._storage, direction=self._direction, load_if_exists=True)
            return SharedStudy(name, self._storage, self._one_at_a_time)


def _open(url: str) -> RDBStorage:
    try:
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 100}} if url.startswith("sqlite") else None,
            heartbeat_interval=HEARTBEAT,
            grace_period=4 * HEARTBEAT,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
    except (ImportError, SQLAlchemyError) as error:  # the URL is not repeated: it may hold a password
        said = str(error).strip().splitlines()[0]
        raise InputError(f"the sweep's `storage` cannot be opened ({said}); give a URL that optuna knows.") from error


def point(trial: FrozenTrial) -> Point:
    """What a trial runs, or is queued for."""
    return trial.system_attrs.get("fixed_params", trial.params)


def key(of: Point) -> str:
    """A text that is the same for equal points."""
    return json.dumps(of, sort_keys=True)


def finished(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The last finished trial of every point, by the point's key."""
    return {key(point(t)): t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}


def reserve(study: optuna.Study, points: list[Point]) -> None:
    """Queue every point that no trial of the study holds yet.

    The queue is what makes a point run once: optuna hands a waiting trial to one worker, while its samplers, the one for
    grids included, can give two workers the same point. Two that fill the queue at once may queue a point twice; of
    these the trial with the lower number holds it, see `held_point`.
    """
    if not points:
        return
    held = {key(point(trial)) for trial in study.get_trials(deepcopy=False, states=HOLDING)}
    for one in points:
        if key(one) not in held:
            study.enqueue_trial(one)


def held_point(study: optuna.Study, number: int) -> Point | None:
    """The point of a trial, unless an earlier one waits for it, runs or has run it. Numbers are given out one by one.

    A trial that optuna made itself, for a worker that found the queue empty a moment after it was not, has none.
    """
    trials = study.get_trials(deepcopy=False)
    mine = next(point(trial) for trial in trials if trial.number == number)
    earlier = (point(trial) for trial in trials if trial.number < number and trial.state in HOLDING)
    return mine if mine and key(mine) not in map(key, earlier) else None


def work(
    studies: dict[str, SharedStudy],
    wanted: Callable[[str], list[Point]],
    run: Callable[[str, Trial, Point], float],
) -> None:
    """Take points from all studies until none is left, or running elsewhere.

    Args:
        studies: by name, in the order in which to take them.
        wanted: from the name of a study to all its points; asked again after every run, because what is wanted may
            follow from what came out. A point is queued once here: one that kills its workers is given up.
        run: one run, from the name of the study, the trial and its point to the value that optuna is to keep.
    """
    seen: set[int] = set()
    queued: dict[str, set[str]] = {name: set() for name in studies}

    def reserve_new(name: str) -> None:
        new = [one for one in wanted(name) if key(one) not in queued[name]]
        queued[name].update(map(key, new))
        reserve(studies[name], new)

    def run_once(name: str, trial: Trial) -> float:
        mine = held_point(trial.study, trial.number)
        if mine is None:
            raise optuna.TrialPruned  # another worker was quicker
        return run(name, trial, mine)

    while True:
        for name, study in studies.items():
            while True:
                reserve_new(name)
                if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                    break
                study.optimize(functools.partial(run_once, name), n_trials=1)
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
        study: of which to look at the trials.
        seen: trials that this process has given one; they are added.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in seen:
            seen.add(trial._trial_id)
            study.record_heartbeat(trial)
    optuna.storages.fail_stale_trials(study)
