"""The kernels in Triton are taken by the compiler that makes code for GPUs, see `compiled_triton`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")


def test_triton_makes_machine_code_of_every_launch():
    tests = Path(__file__).with_name("compiled_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", str(tests)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
