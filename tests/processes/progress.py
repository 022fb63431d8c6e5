"""Limits that follow progress and not the clock: a busy machine fails no test, and a deadlock is seen on an idle one.

Progress is processor time. Programs that work, however slowly, use some; those that wait for each other use none. And
none may use more than any test needs, in case it turns in circles.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil


QUIET = 120.0  # s; in this time no program that is stuck uses
SOME = 2.0  # s of a core: launchers look after their workers ten times a second, and use half of that
MOST = 600.0  # s of a core
EVERY = 1.0  # s; to look at all processes takes time
SHOWN = 12000  # characters of each log


class StuckError(Exception):
    """Programs make no progress; the message shows what every thread of them was doing."""


class Progress:
    """Of all that this process has started, itself or by others."""

    def __init__(self):
        self._before, self._since, self._checked = processor_times(), time.monotonic(), time.monotonic()

    def check(self, logs):
        """Abort all programs if there was no progress for too long.

        Args:
            logs: files that their stderr goes to.

        Raises:
            StuckError: that is so.
        """
        if time.monotonic() - self._checked < EVERY:
            return
        self._checked, now = time.monotonic(), processor_times()
        if any(used > MOST for used in now.values()):
            raise StuckError(f"a program has used {MOST:g} s of a core\n{last_words(logs)}")
        if any(used - self._before.get(program, 0) > SOME for program, used in now.items()):
            self._before, self._since = now, self._checked
        elif self._checked - self._since > QUIET:
            raise StuckError(f"no program has used {SOME:g} s of a core in {QUIET:g} s\n{last_words(logs)}")


def programs():
    """Every process below this one, without the server and its clients: what they run is a process of its own."""
    return [program for program in psutil.Process().children(recursive=True) if not only_passes_on(program)]


def only_passes_on(program):
    with contextlib.suppress(psutil.NoSuchProcess):
        command = program.cmdline()
        is_server = "tests.processes.server" in command and program.ppid() == os.getpid()
        return is_server or any(part.endswith("tests/processes/client.py") for part in command)
    return True


def processor_times():
    """Seconds of a core that every program has used, with its children that have ended: some have many short ones."""
    times = {}
    for program in programs():
        with contextlib.suppress(psutil.NoSuchProcess):
            times[program] = sum(program.cpu_times()[:4])
    return times


def last_words(logs):
    """Abort every program, upon which Python shows where its threads are, and return what the logs end with."""
    aborted = programs()
    for program in reversed(aborted):  # those that were started last first
        with contextlib.suppress(psutil.NoSuchProcess):
            program.send_signal(signal.SIGABRT)
    psutil.wait_procs(aborted, timeout=10)
    return "\n".join(f"==== {log}\n{Path(log).read_text(errors='replace')[-SHOWN:]}" for log in logs)
