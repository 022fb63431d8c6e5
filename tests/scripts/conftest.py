"""Run a script as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def run(*command, check=True, timeout=300):
        """`command`: script and arguments; `check`: fail the test if the script fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "MPLCONFIGDIR": str(home / "..")}
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode != 0:
            pytest.fail(f"{command} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
        # Nothing is written outside the output folder.
        assert list(home.rglob("*")) == []
        return result

    return run
