"""The same global batch gives the same step sizes on one process and on two, plain, sharded, accumulated."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_zero import ENVIRONMENT


CASES = [
    f"{method} {dtype} {accumulated}"
    for method in ("momo", "momo_adam")
    for dtype in ("float64", "float32")
    for accumulated in ("1 0.0", "2 0.5")
]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def run(kind, world):
        return run_workers("tests.distributed.workers:matrix", world, tmp_path_factory.mktemp(kind), kind)

    return {"alone": run("ddp", 1), "ddp": run("ddp", 2), "fsdp2": run("fsdp2", 2)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_step_sizes_equal_those_of_one_process(runs, kind, case):
    expected, found = runs["alone"][0][case]["log"], runs[kind][0][case]["log"]
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=TOLERANCE[case.split()[1]], atol=0)
    assert expected[:, 0].unique().numel() > 10


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_agree_bit_for_bit(runs, kind, case):
    first, second = (run[case] for run in runs[kind])
    assert torch.equal(first["log"], second["log"])
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


def test_ddp_replicas_are_bitwise_equal_after_50_steps(tmp_path):
    first, second = run_workers("tests.distributed.workers:long_run", 2, tmp_path, "ddp")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("kind, in_step", [("ddp", []), ("fsdp2", ["all_reduce 4 waits"])])
def test_one_collective_for_the_loss_and_one_for_the_sums(tmp_path, kind, in_step):
    """The loss is reduced before the backward pass of the last micro-batch; the sums n, s and what strayed travel together."""
    events, _ = run_workers("tests.distributed.workers:collectives", 2, tmp_path, kind)
    window = ["backward", "all_reduce 1 async", "backward", *in_step, "step"]
    assert events == window + window


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    return run_workers("tests.distributed.workers_zero:matrix", 2, folder, environment=ENVIRONMENT)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["momo", "momo_adam"])
@pytest.mark.parametrize("accumulated", ["1 0.0", "2 0.5"])
def test_zero_equals_ddp(runs, zero, stage, method, accumulated):
    expected = runs["ddp"][0][f"{method} float32 {accumulated}"]["log"]
    for rank in zero:
        torch.testing.assert_close(rank[f"{stage} {method} {accumulated}"][:, 0], expected[:, 0], rtol=1e-4, atol=0)


def test_what_zero_pads_its_partitions_with_is_not_read(runs, zero):
    expected = runs["ddp"][0]["momo_adam float32 1 0.0"]["log"]
    for rank in zero:
        torch.testing.assert_close(rank["unwritten"][:, 0], expected[:, 0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["by hand", "interrupted"])
def test_zero_takes_losses_by_hand_and_forgets_interrupted_ones(runs, zero, name):
    expected = runs["ddp"][0]["momo_adam float32 2 0.0"]["log"]
    for rank in zero:
        torch.testing.assert_close(rank[name][:, 0], expected[:2, 0], rtol=1e-4, atol=0)


def test_zero_refuses_what_has_no_single_step_size(tmp_path):
    target = "tests.distributed.workers_zero:refusals"
    messages, _ = run_workers(target, 2, tmp_path, environment=ENVIRONMENT)
    fixes = {
        "stage 0": '"zero_optimization": {"stage": 1}',
        "groups": "Pass one group",
        "averaging": "launch with configs/accelerate/fsdp2.yaml",
        "sub-groups": '"sub_group_size": 1e15',
        "offload": '"zero_force_ds_cpu_optimizer": false',
    }
    assert messages.keys() == fixes.keys()
    for name, fix in fixes.items():
        assert fix in messages[name], messages[name]
