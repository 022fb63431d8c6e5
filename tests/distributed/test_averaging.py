"""Averaged iterates on several processes equal those on one, in training and in eval mode, in checkpoints and files."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_trainer import ENVIRONMENTS


WORKERS = "tests.distributed.workers_averaging:"
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "changed": 1e-10}


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return True


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_workers(WORKERS + "alone", 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize("world, kinds", [(2, "fsdp2,offload"), (4, "hsdp")])
def test_a_sharded_run_equals_one_process(alone, world, kinds, tmp_path):
    """With empty shards, frozen and unused parameters, a NaN on one rank, changes from outside, and one collective a step."""
    runs = run_workers(WORKERS + "sharded", world, tmp_path, kinds)
    assert [run.pop("said") for run in runs] == [0] * world
    for case, found in runs[0].items():
        dtype = case.split()[1]
        expected, tolerance = alone[dtype], TOLERANCE[dtype]
        assert close(found["log"][:, :3], expected["log"][:, :3], tolerance)
        assert found["log"][:, 3].tolist() == expected["log"][:, 3].tolist() == [0] * 5 + [1] * 7
        assert found["log"][:, 4].unique().tolist() == [1] and expected["log"][:, 4].unique().tolist() == [0]
        assert close(found["x"], expected["x"], tolerance) and close(found["y"], expected["y"], tolerance)
        assert not close_enough(found["x"], found["y"])
        assert ((found["x"]["first.weight"] == 0).sum() > 5) == (dtype == "changed")
        assert all(torch.equal(run[case]["x"][name], found["x"][name]) for run in runs for name in found["x"])


def close_enough(x, y):
    return all(torch.allclose(x[name], y[name], atol=1e-3) for name in x)


def test_loops_on_accelerate_agree_bit_for_bit_between_ranks(alone, tmp_path):
    first, second = run_workers(WORKERS + "loops", 2, tmp_path)
    for kind, found in first.items():
        expected = alone[kind.split(" ", 1)[1] if "lookup" in kind else "loop"]
        for name in ("tables", "embeddings"):
            assert found[name] == expected[name] == ((0,) if "lookup" in kind else None)
        for mode in ("x", "y"):
            assert all(torch.equal(weight, second[kind][mode][name]) for name, weight in found[mode].items())
            assert close(found[mode], expected[mode], 1e-4)


def test_torch_distributed_checkpoint_continues_bit_for_bit(tmp_path):
    for rank in run_workers(WORKERS + "checkpoints", 2, tmp_path):
        for before, after in rank.values():
            assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_trainers_save_and_resume_the_averaged_weights(tmp_path):
    expected, _ = run_workers(WORKERS + "trainer", 1, tmp_path / "alone", "plain")[0]
    for kind in ("plain", "fsdp2"):
        folder = tmp_path / kind
        for whole, resumed in run_workers(WORKERS + "trainer", 2, folder, kind, environment=ENVIRONMENTS[kind]):
            for name, weight in whole["model"].items():
                assert torch.equal(weight, resumed["model"][name])
                assert torch.equal(weight, whole["file"][name])
            assert close(whole["model"], expected["model"], 1e-5)
