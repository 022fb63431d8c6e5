"""Start Python programs and wait for them as long as they make progress."""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from tests.processes.progress import Progress


ROOT = Path(__file__).parents[2]
CLIENT = str(ROOT / "tests/processes/client.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment_for(**variables):
    """The environment of a program: this checkout first, one thread, no network, a traceback where it is aborted."""
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **fixed, **variables}


@cache
def server():
    """Start the server of this process, once; returns its folder, with a socket and a home folder, and the process."""
    folder = Path(tempfile.mkdtemp())
    (folder / "home").mkdir()
    # Packages look for these when they are imported; pyarrow starts a thread.
    environment = environment_for(
        HOME=str(folder / "home"),
        MPLCONFIGDIR=str(folder / "matplotlib"),
        JE_ARROW_MALLOC_CONF="background_thread:false",
        DS_ACCELERATOR="cpu",
    )
    command = [sys.executable, "-m", "tests.processes.server", str(folder / "socket")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    @atexit.register
    def stop():
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder)

    assert process.stdout.readline() == "ready\n"
    return folder, process


class Forked(subprocess.Popen):
    """A program that the server has forked."""

    def kill(self):
        self.send_signal(signal.SIGUSR1)  # see client.py


def start(*command, cold=False, environment=None, **options):
    """Start a Python program.

    Args:
        command: what follows `python` on a command line: a script, -m and a module, or -c and code, and arguments.
        cold: by python itself and not by a fork: for what packages read when they are imported, such as HOME.
        environment: variables on top of `environment_for()`.
        options: of `subprocess.Popen`.
    """
    environment = environment_for(**(environment or {}))
    command = [sys.executable, *([] if cold else ["-I", "-S", CLIENT]), *map(str, command)]
    if not cold:
        environment["MOMO_TEST_SERVER"] = str(server()[0] / "socket")
    return (subprocess.Popen if cold else Forked)(command, env=environment, **{"cwd": ROOT, **options})


def wait(processes, logs, all_or_none=False):
    """Wait for programs as long as they make progress; afterwards none of them runs.

    Args:
        processes: from `start`.
        logs: files that their stderr goes to.
        all_or_none: end the others when one has failed.

    Raises:
        StuckError: they make none.
    """
    progress = Progress()
    try:
        while any(process.poll() is None for process in processes):
            if all_or_none and any(process.poll() for process in processes):
                break
            progress.check(logs)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(*command, **options):
    """`start` a program and wait for it; returns a `subprocess.CompletedProcess` with its output as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        with files[0].open("w") as stdout, files[1].open("w") as stderr:
            process = start(*command, stdout=stdout, stderr=stderr, **options)
        wait([process], files)
        return subprocess.CompletedProcess(process.args, process.returncode, *(file.read_text() for file in files))
