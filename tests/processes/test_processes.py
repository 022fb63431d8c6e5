"""Programs that tests start: they end as under python, and what hangs shows where."""

import signal
import threading
import time

import pytest

from tests.distributed.launch import run_workers
from tests.processes import progress
from tests.processes.start import Forked, run, start


@pytest.mark.parametrize("cold", [False, True])
def test_a_program_ends_as_under_python(cold):
    shown = run("-c", "import sys; print(sys.argv, __name__); print('x', file=sys.stderr)", 1, "--a", cold=cold)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "['-c', '1', '--a'] __main__\n", "x\n")
    assert run("-c", "import sys; sys.exit(3)", cold=cold).returncode == 3
    refused = run("-c", "import sys; sys.exit('no')", cold=cold)
    assert (refused.returncode, refused.stderr) == (1, "no\n")
    failed = run("-c", "import atexit; atexit.register(print, 'bye'); 1 / 0", cold=cold)
    assert failed.returncode == 1 and failed.stdout == "bye\n" and "ZeroDivisionError" in failed.stderr
    killed = run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", cold=cold)
    assert killed.returncode == -signal.SIGKILL


def test_signals_reach_a_forked_program(tmp_path):
    code = "import time, pathlib; pathlib.Path('there').touch(); time.sleep(1000)"
    for stop, status in ((Forked.kill, -signal.SIGKILL), (Forked.terminate, -signal.SIGTERM)):
        program = start("-c", code, cwd=tmp_path)
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        stop(program)
        assert program.wait() == status
        (tmp_path / "there").unlink()


@pytest.mark.parametrize("cold", [False, True])
def test_a_program_that_hangs_shows_where(monkeypatch, cold):
    monkeypatch.setattr(progress, "QUIET", 3.0)
    code = "import threading\ndef stuck_here():\n    threading.Event().wait()\nstuck_here()"
    with pytest.raises(progress.StuckError, match=r"(?s)no program has used.*line 3 in stuck_here"):
        run("-c", code, cold=cold)


def wait_for_the_other(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        threading.Event().wait()


def test_workers_that_wait_for_each_other_show_where(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "QUIET", 3.0)
    with pytest.raises(progress.StuckError) as error:
        run_workers("tests.processes.test_processes:wait_for_the_other", 2, tmp_path)
    first, second = str(error.value).split("rank1.log")
    assert "in barrier" in first and "in wait\n" in second and "in wait_for_the_other" in second


def test_a_program_that_turns_in_circles_shows_where(monkeypatch):
    monkeypatch.setattr(progress, "MOST", 1.0)
    code = "def turn():\n    while True:\n        pass\nturn()"
    with pytest.raises(progress.StuckError, match=r"(?s)has used 1 s of a core.*in turn"):
        run("-c", code)


def test_a_slow_program_is_waited_for(monkeypatch):
    """It works a tenth of the time only, for longer than a program that is stuck may."""
    monkeypatch.setattr(progress, "QUIET", 2.0)
    monkeypatch.setattr(progress, "SOME", 0.04)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    code = """
import time
for _ in range(25):
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass
    time.sleep(0.18)
"""
    assert run("-c", code).returncode == 0
