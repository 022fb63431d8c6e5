"""Sweeps: the table and its decades, and what becomes of runs that diverge, crash or are interrupted."""

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure
from optuna.trial import TrialState

from momo_hf.recipes.sweeps.config import load_sweep
from momo_hf.recipes.sweeps.figures import plot_sweep
from momo_hf.recipes.sweeps.queue import Queue, finished, held_point, key, point, reserve
from momo_hf.recipes.sweeps.queue import work as work_on
from momo_hf.recipes.sweeps.results import collect, decades, summary
from momo_hf.recipes.sweeps.running import work
from tests.processes.progress import Progress
from tests.processes.start import start


def test_every_run_is_a_result(sweep_file):
    sweep = load_sweep(sweep_file)
    # The optimizer's default joins the grid: 1e-3 for AdamW, 1 for Momo.
    assert sweep.grids == {"adamw": [0.001, 0.01, 1, 10], "momo": [0.1, 1]} and sweep.number_of_runs == 12
    work(sweep, 0)
    runs = collect(sweep)
    assert len(runs) == 12
    outcomes = runs.set_index(["optimizer", "learning_rate", "seed"])["outcome"]
    assert outcomes["adamw", 0.01, 0] == "ok" and outcomes["adamw", 1, 1] == "diverged"
    assert outcomes["adamw", 10, 0] == "crashed: RuntimeError: out of memory"
    assert math.isnan(runs["value"][runs["learning_rate"] == 10].iloc[0])
    assert all(len(history) <= 200 for history in runs["history"])

    table = summary(sweep, runs).set_index("optimizer")
    assert table.loc["adamw", "best value"] == pytest.approx(0.501) and table.loc["adamw", "best lr"] == 0.001
    assert table.loc["adamw", "value at default lr"] == pytest.approx(0.501)
    assert math.isnan(table.loc["momo", "value at default lr"]) and table.loc["momo", "best value"] == pytest.approx(
        0.6
    )
    for path in plot_sweep(sweep, runs):
        assert path.stat().st_size > 1000

    # Nothing is left to do.
    before = (sweep_file.parent / "runs.txt").read_text()
    work(sweep, 1)
    assert [len(sweep.study(name).trials) for name in sweep.optimizers] == [8, 4]
    assert (sweep_file.parent / "runs.txt").read_text() == before


def test_other_metrics_are_in_csv_table_and_figure(sweep_file, monkeypatch):
    sweep = load_sweep(sweep_file, more_metrics={"other": "maximize"})
    work(sweep, 0)
    runs = collect(sweep)
    ok = runs[runs["outcome"] == "ok"]
    assert list(ok["other"]) == pytest.approx(list(2 * ok["learning_rate"] - ok["seed"]))
    assert runs[runs["outcome"] != "ok"]["other"].isna().all()
    table = summary(sweep, runs).set_index("optimizer")
    assert table["other there"].to_dict() == pytest.approx({"adamw": 2 * 0.001 - 0.5, "momo": 2 * 0.1 - 0.5})
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot_sweep(sweep, runs)
    first, second, *rest = figures[0].axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("value", "other") and len(rest) == 2
    (line,) = [line for line in second.lines if line.get_label() == "momo"]
    assert dict(line.get_xydata())[0.1] == pytest.approx(2 * 0.1 - 0.5)


WORKER = """
import os, signal, sys, optuna
from momo_hf.recipes.sweeps import config, queue, running
signal.signal(signal.SIGTERM, signal.default_int_handler)
queue.HEARTBEAT = 3
if sys.argv[3:] == ["killed before its first heartbeat"]:
    optuna.storages.RDBStorage.record_heartbeat = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
running.work(config.load_sweep(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture
def start_worker(sweep_file):
    workers = []

    def start_one(*more):
        with (sweep_file.parent / f"worker-{len(workers)}.log").open("w") as log:
            workers.append(start("-c", WORKER, sweep_file, 0, *more, stdout=log, stderr=log))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.kill()
        worker.wait()


def runs(sweep_file):
    path = sweep_file.parent / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, sweep_file):
    """Wait until a condition holds, as long as the workers make progress."""
    progress = Progress()
    while not condition():
        progress.check(sweep_file.parent.glob("worker-*.log"))
        time.sleep(0.05)


def end_of(worker, sweep_file):
    """How a worker ends."""
    wait_for(lambda: worker.poll() is not None, sweep_file)
    return worker.returncode


def test_two_workers_run_every_point_once_and_one_takes_over_what_the_other_left(sweep_file, start_worker):
    held = sweep_file.parent / "wait-0.01-1"
    held.touch()
    workers = [start_worker(), start_worker()]  # both start with the same study
    # One is held up by a point; the other does all the rest, and then waits rather than run that point a second time.
    wait_for(lambda: len(runs(sweep_file)) == 12, sweep_file)
    time.sleep(2)
    assert len(set(runs(sweep_file))) == len(runs(sweep_file)) == 12
    assert [worker.poll() for worker in workers] == [None, None]
    # Killed, the first one leaves the point to the second.
    os.kill(int(held.read_text()), signal.SIGKILL)
    held.unlink()
    assert sorted(end_of(worker, sweep_file) for worker in workers) == [-signal.SIGKILL, 0]
    sweep = load_sweep(sweep_file)
    assert {name: len(finished(sweep.study(name))) for name in sweep.optimizers} == {"adamw": 8, "momo": 4}
    assert (
        sorted(runs(sweep_file)) == sorted([*set(runs(sweep_file)), "adamw_torch 0.01 1"])
        and len(runs(sweep_file)) == 13
    )


def test_workers_that_ask_at_once_never_get_one_trial(sweep_file):
    def take(turn):
        study, taken = load_sweep(sweep_file).study("adamw"), []
        while (number := study._pop_waiting_trial_id()) is not None:
            taken.append(number)
        return taken

    with ThreadPoolExecutor(4) as pool:
        study, *_ = pool.map(lambda _: load_sweep(sweep_file).study("adamw"), range(4))  # all make the storage at once
        for seed in range(40):
            study.enqueue_trial({"learning_rate": 0.1, "seed": seed})
        taken = [number for numbers in pool.map(take, range(4)) for number in numbers]
    assert len(taken) == len(set(taken)) == 40


def test_a_trial_that_nobody_queued_runs_nothing(sweep_file):
    study = load_sweep(sweep_file).study("adamw")
    first = {"learning_rate": 0.1, "seed": 0}
    for one in (first, first, {"learning_rate": 0.1, "seed": 1}):
        study.enqueue_trial(one)
    # The fourth is what optuna makes where two workers saw the same last trial wait.
    held = [held_point(study, study.ask().number) for _ in range(4)]
    assert held == [first, None, {"learning_rate": 0.1, "seed": 1}, None]


def test_what_is_wanted_may_follow_from_what_came_out_and_is_queued_once(tmp_path):
    study, runs = Queue(tmp_path, None, "queue").study("study"), []

    def wanted(name):
        assert name == "study"
        return [{"a": 1}, {"a": 2}] + [{"a": 3}] * (key({"a": 2}) in finished(study))

    def run(name, trial, one):
        runs.append(one["a"])
        assert len(runs) < 5
        if one["a"] == 1:
            raise optuna.TrialPruned  # as where a worker is lost again and again: it leaves no result
        return 0.5

    work_on({"study": study}, wanted, run)
    assert runs == [1, 2, 3] and set(finished(study)) == {key({"a": 2}), key({"a": 3})}
    assert (tmp_path / "queue.sqlite3").is_file()


def test_a_stopped_sweep_continues_and_a_point_that_is_queued_twice_runs_once(sweep_file, start_worker):
    held = sweep_file.parent / "wait-0.01-1"
    held.touch()
    worker = start_worker()
    wait_for(held.read_text, sweep_file)
    worker.terminate()
    assert end_of(worker, sweep_file) != 0
    held.unlink()
    before = runs(sweep_file)
    sweep = load_sweep(sweep_file)
    study = sweep.study("adamw")
    reserve(study, sweep.points("adamw"))
    study.enqueue_trial({"learning_rate": 0.01, "seed": 1})  # as another machine may at the same moment
    # The point was given back when the worker stopped, and not by a heartbeat that failed to come.
    states = [trial.state for trial in study.get_trials() if point(trial) == {"learning_rate": 0.01, "seed": 1}]
    assert states == [TrialState.FAIL, TrialState.WAITING, TrialState.WAITING]
    work(sweep, 0)
    assert {name: len(finished(sweep.study(name))) for name in sweep.optimizers} == {"adamw": 8, "momo": 4}
    assert sorted(runs(sweep_file)[len(before) :]) == sorted({*runs(sweep_file)} - {*before} | {"adamw_torch 0.01 1"})


def test_a_worker_killed_before_its_first_heartbeat_leaves_its_point_to_the_others(sweep_file, start_worker):
    assert end_of(start_worker("killed before its first heartbeat"), sweep_file) == -signal.SIGKILL
    sweep = load_sweep(sweep_file)
    states = [trial.state for trial in sweep.study("adamw").get_trials()]
    assert states.count(TrialState.RUNNING) == 1 and runs(sweep_file) == []
    assert end_of(start_worker(), sweep_file) == 0
    assert {name: len(finished(sweep.study(name))) for name in sweep.optimizers} == {"adamw": 8, "momo": 4}
    assert len(set(runs(sweep_file))) == len(runs(sweep_file)) == 12


def test_decades():
    assert decades([0.001, 0.01, 0.1, 1, 10], [False, True, True, False, True]) == pytest.approx(1)
    assert decades([0.001, 0.01, 0.1, 1], [True] * 4) == pytest.approx(3)


def test_the_table_takes_the_mean_over_seeds_and_the_best_of_all(sweep_file):
    sweep = load_sweep(sweep_file, direction="maximize", seeds=[0, 1])
    values = {"adamw": [0.90, 0.95, 0.20, 0.1], "momo": [1.00, 0.97]}
    rows = [
        {"optimizer": name, "learning_rate": lr, "seed": seed, "value": value + (0.01 if seed else -0.01)}
        for name, column in values.items()
        for lr, value in zip(sweep.grids[name], column)
        for seed in (0, 1)
    ]
    table = summary(sweep, pd.DataFrame(rows)).set_index("optimizer")
    assert table.loc["adamw", "best value"] == pytest.approx(0.95)
    assert table.loc["adamw", "decades within 5%"] == 0 and table.loc["adamw", "decades within 10%"] == 1
    assert table.loc["momo", "decades within 5%"] == 1
