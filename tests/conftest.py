"""Shared set-up: no network, one thread per process, nothing written outside tmp_path."""

import os

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def fresh_state():
    """As at the start of a process: accelerate's singletons outlive a run."""
    from accelerate.state import AcceleratorState, GradientState  # after the environment above

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
