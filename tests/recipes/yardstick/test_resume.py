"""A yardstick that is killed goes on with what is left."""

import os
import signal
import time

import pytest

from momo_hf.recipes.yardstick.data import Places
from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.results import collect
from momo_hf.recipes.yardstick.rivals import load_rivals
from momo_hf.recipes.yardstick.task import load_task
from tests.processes.progress import Progress
from tests.processes.start import start


# A task that says what it runs, and stops where it is told to.
LOGGED = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def held_out_with_log(model, data):
    measures = held_out_before(model, data)
    with (HERE / "runs.txt").open("a") as log:
        log.write(f"{float(measures['loss'])!r}\\n")
    if (HERE / "hold").exists() and len((HERE / "runs.txt").read_text().splitlines()) == 4:
        (HERE / "hold").write_text(str(os.getpid()))
        time.sleep(1000)
    return measures

held_out_before, held_out = held_out, held_out_with_log
"""
WORKER = """
import sys
from pathlib import Path
from momo_hf.recipes.sweeps import queue
from momo_hf.recipes.yardstick.running import work
from tests.recipes.yardstick.test_resume import plan_of
queue.HEARTBEAT = 1
work(plan_of(Path(sys.argv[1])), 0)
"""


def plan_of(folder):
    task, rivals = load_task(str(folder / "line.py")), load_rivals(["adamw"], folder / "rivals.yaml")
    return Plan([task], rivals, [0, 1], None, Places(None, folder / "prepared"), folder / "out")


@pytest.fixture
def start_worker(tmp_path):
    workers = []

    def start_one():
        with (tmp_path / f"worker-{len(workers)}.log").open("w") as log:
            workers.append(start("-c", WORKER, tmp_path, stdout=log, stderr=log))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.kill()
        worker.wait()


def test_a_killed_worker_leaves_its_run_to_the_next(own_task, own_rivals, tmp_path, start_worker):
    own_task.write_text(own_task.read_text() + LOGGED)

    def wait_for(condition):
        progress = Progress()
        while not condition():
            progress.check(tmp_path.glob("worker-*.log"))
            time.sleep(0.05)

    def runs():
        return (tmp_path / "runs.txt").read_text().splitlines()

    (tmp_path / "hold").touch()
    worker = start_worker()
    wait_for((tmp_path / "hold").read_text)
    os.kill(int((tmp_path / "hold").read_text()), signal.SIGKILL)
    wait_for(lambda: worker.poll() is not None)
    (tmp_path / "hold").unlink()
    before = runs()
    assert len(before) == 4 and len(collect(plan_of(tmp_path))) == 3
    other = start_worker()
    wait_for(lambda: other.poll() is not None)
    assert other.returncode == 0
    table = collect(plan_of(tmp_path))
    # The run that was cut off was done twice, alike, and no other one.
    assert len(runs()) == len(table) + 1 and runs().count(before[3]) == 2 and len(set(runs())) == len(table)
    assert sorted(table["loss"]) == sorted(map(float, set(runs())))
    assert set(table["seed"]) == {0, 1} and len(table[table["seed"] == 0]) == 6
