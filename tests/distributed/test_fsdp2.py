"""fully_shard and what it meets: uneven and empty shards, frozen and unused parameters, replicas, offload, bf16."""

import pytest
import torch

from tests.distributed.launch import run_workers


WORKERS = "tests.distributed.workers_fsdp2:"
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    alone = run_workers(WORKERS + "alone", 1, tmp_path_factory.mktemp("alone"))[0]
    two = run_workers(WORKERS + "sharded", 2, tmp_path_factory.mktemp("two"), "fsdp2,mixed,offload")
    four = run_workers(WORKERS + "sharded", 4, tmp_path_factory.mktemp("four"), "hsdp")
    return alone, {**two[0], **four[0]}


@pytest.mark.parametrize("kind", ["fsdp2", "mixed", "offload", "hsdp"])
@pytest.mark.parametrize("case", [f"{m} {d}" for m in ("momo", "momo_adam") for d in ("float64", "float32")])
def test_a_sharded_run_equals_one_process(runs, kind, case):
    alone, sharded = runs
    expected, found = alone[case], sharded[f"{kind} {case}"]
    tolerance = TOLERANCE[case.split()[1]]
    torch.testing.assert_close(found["log"][:, 0], expected["log"][:, 0], rtol=tolerance, atol=0)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=tolerance, atol=tolerance)
    # One collective per mesh and step, whatever the number of parameters and groups.
    assert found["log"][:, 1].unique().tolist() == [1.0] and expected["log"][:, 1].unique().tolist() == [0.0]


def test_compiled_passes_take_the_same_steps_on_shards(runs, tmp_path):
    """With parameters that have a gradient on every other step, and an empty shard on one rank."""
    expected = runs[0]["momo_adam float64"]
    for found in run_workers(WORKERS + "compiled", 2, tmp_path):
        torch.testing.assert_close(found["log"][:, 0], expected["log"][:, 0], rtol=1e-10, atol=0)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-10)


def test_shards_follow_rounding_late_parameters_and_changes_from_outside(tmp_path):
    (alone,) = run_workers(WORKERS + "followed", 1, tmp_path / "alone")
    for rank in run_workers(WORKERS + "followed", 2, tmp_path / "two"):
        torch.testing.assert_close(rank["log"], alone["log"], rtol=1e-5, atol=1e-9)
        assert all(torch.equal(x, y) for x, y in zip(rank["weights"], alone["weights"]))
        assert rank["reads"] == alone["reads"] == [10]
        assert rank["counts"] == alone["counts"] == [0.0, 4.0, 0.0]
    assert alone["log"].unique().numel() > 20


def test_a_non_finite_value_on_one_rank_stops_all(tmp_path):
    for rank in run_workers(WORKERS + "non_finite", 2, tmp_path):
        for where in ("grad", "loss"):
            assert [rank[f"{where} {step}"] for step in range(3)] == [[1, 0], [0, 1], [1, 1]]


def test_torch_distributed_checkpoint_continues_bit_for_bit(tmp_path):
    whole = run_workers(WORKERS + "checkpoint", 2, tmp_path / "whole")
    resumed = run_workers(WORKERS + "checkpoint", 2, tmp_path / "resumed", tmp_path / "whole" / "dcp")
    for before, after in zip(whole, resumed):
        assert torch.equal(before["log"][4:], after["log"])
        assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
        assert after["dtypes"] == ["torch.float32"]


def test_torch_distributed_checkpoint_continues_on_one_process(tmp_path):
    whole = run_workers(WORKERS + "checkpoint", 2, tmp_path / "whole")[0]
    (alone,) = run_workers(WORKERS + "checkpoint", 1, tmp_path / "alone", tmp_path / "whole" / "dcp")
    # bf16 gradients of half batches round differently from those of whole ones.
    torch.testing.assert_close(alone["log"], whole["log"][4:], rtol=0.05, atol=1e-3)
