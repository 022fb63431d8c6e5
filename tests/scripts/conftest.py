"""Run a script as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script():
    def run(*command, launch=None, check=True, timeout=300):
        """`command`: script and arguments; `launch`: name of a file in configs/accelerate, or None for plain python."""
        start = [sys.executable]
        if launch:
            start += ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{launch}.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*start, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
        if check and result.returncode != 0:
            pytest.fail(f"{command} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
        return result

    return run
