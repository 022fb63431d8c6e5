"""A run that was killed and resumed equals the one that was not."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_trainer import ENVIRONMENTS


TRAINER = "tests.distributed.workers_trainer:"
LOOP = "tests.distributed.workers:saved"


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
    (whole, *_) = run_workers(TRAINER + "run", world, tmp_path / "whole", kind, environment=environment)
    killed = run_workers(TRAINER + "run", world, tmp_path / "killed", kind, 5, environment=environment, check=False)
    assert killed == [None] * world
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    (resumed, *_) = run_workers(
        TRAINER + "run", world, tmp_path / "resumed", kind, "", checkpoint, environment=environment
    )
    assert len(whole) == 9 and resumed[-5:, 0].tolist() == [5, 6, 7, 8, 9]
    if kind.startswith("zero"):
        torch.testing.assert_close(resumed[-5:], whole[4:], rtol=1e-5, atol=0)
    else:
        assert torch.equal(resumed[-5:], whole[4:])


@pytest.mark.parametrize("kind, world", [("ddp", 1), ("ddp", 2), ("fsdp2", 2)])
def test_save_state_continues_bit_for_bit(tmp_path, kind, world):
    whole = run_workers(LOOP, world, tmp_path / "whole", kind, 4)
    resumed = run_workers(LOOP, world, tmp_path / "resumed", kind, "", tmp_path / "whole" / "state")
    for before, after in zip(whole, resumed):
        assert torch.equal(before["log"][4:], after["log"])
        assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())


@pytest.mark.parametrize("saved_on, resumed_on", [(1, 2), (2, 1)])
def test_save_state_continues_on_another_number_of_processes(tmp_path, saved_on, resumed_on):
    whole = run_workers(LOOP, saved_on, tmp_path / "whole", "ddp", 4)[0]
    resumed = run_workers(LOOP, resumed_on, tmp_path / "resumed", "ddp", "", tmp_path / "whole" / "state")[0]
    torch.testing.assert_close(resumed["log"], whole["log"][4:], rtol=1e-4, atol=1e-6)
