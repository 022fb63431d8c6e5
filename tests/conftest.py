"""Shared set-up: no network, one thread per process, nothing written outside tmp_path; which tests are fast, and come last."""

import gc
import os

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read where triton is imported, and the tests use no GPU

# Files that start processes, compile, or train for long; all other tests are `fast`, unless they are marked `slow`.
SLOW = (
    "tests/distributed/",
    "tests/processes/",
    "tests/scripts/",
    "tests/integrations/test_interrupted.py",
    "tests/optim/test_compiled.py",
    "tests/optim/test_direct.py",
    "tests/optim/test_triton",
    "tests/recipes/sweeps/",
    "tests/recipes/yardstick/test_resume.py",
    "tests/test_package.py",
    "tests/test_unchanged_scripts.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))  # so that both processes end at the same time
    for item in items:
        if not item.nodeid.startswith(SLOW) and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays():
    """A Trainer has all garbage collected, and looking at what packages made when they were imported takes longer than a test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or packages count what is left at the end, and tell


@pytest.fixture
def fresh_state():
    """As at the start of a process: accelerate's singletons outlive a run."""
    from accelerate.state import AcceleratorState, GradientState  # after the environment above

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
