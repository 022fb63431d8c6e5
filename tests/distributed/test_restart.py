"""A run that was killed and resumed equals the one that was not."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_trainer import ENVIRONMENTS


TRAINER = "tests.distributed.workers_trainer:"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_workers(TRAINER + "matrix", 1, tmp_path_factory.mktemp("alone"), "plain")[0]


@pytest.mark.parametrize("kinds", ["plain", "fsdp2", "zero1,zero2,zero3"])
def test_trainer_on_two_processes_equals_one(alone, tmp_path, kinds):
    """Losses, step sizes and averages, with clipping, token counts and an incomplete last window."""
    environment = ENVIRONMENTS[kinds.split(",")[0]]
    for rank in run_workers(TRAINER + "matrix", 2, tmp_path, kinds, environment=environment):
        for case, found in rank.items():
            torch.testing.assert_close(found, alone["plain " + case.split()[1]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind, world", [("plain", 1), ("plain", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_trainer_continues_after_kill_9(tmp_path, kind, world):
    environment = ENVIRONMENTS[kind]
    killed = run_workers(TRAINER + "run", world, tmp_path / "killed", kind, 5, environment=environment, check=False)
    assert killed == [None] * world
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    (both, *_) = run_workers(TRAINER + "resumed_and_whole", world, tmp_path, kind, checkpoint, environment=environment)
    resumed, whole = both
    assert len(whole) == 9 and resumed[-5:, 0].tolist() == [5, 6, 7, 8, 9]
    if kind.startswith("zero"):
        torch.testing.assert_close(resumed[-5:], whole[4:], rtol=1e-5, atol=0)
    else:
        assert torch.equal(resumed[-5:], whole[4:])


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
    """By kind and number of processes: the folder, and per rank a run and its continuation from step 4."""
    runs = {}
    for kind, world in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)):
        folder = tmp_path_factory.mktemp(f"{kind}{world}")
        runs[kind, world] = folder, run_workers("tests.distributed.workers:saved_and_resumed", world, folder, kind)
    return runs


@pytest.mark.parametrize("kind, world", [("ddp", 1), ("ddp", 2), ("fsdp2", 2)])
def test_save_state_continues_bit_for_bit(saved_runs, kind, world):
    for before, after in saved_runs[kind, world][1]:
        assert torch.equal(before["log"][4:], after["log"])
        assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())


@pytest.mark.parametrize("saved_on, resumed_on", [(1, 2), (2, 1)])
def test_save_state_continues_on_another_number_of_processes(saved_runs, tmp_path, saved_on, resumed_on):
    folder, ((whole, _), *_) = saved_runs["ddp", saved_on]
    resumed = run_workers("tests.distributed.workers:saved", resumed_on, tmp_path, "ddp", "", folder / "state")[0]
    torch.testing.assert_close(resumed["log"], whole["log"][4:], rtol=1e-8, atol=1e-10)
