"""The search for the cap on several processes: the cap of one process, the same bits on all, saved and taken up again."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_search import by_hand
from tests.distributed.workers_zero import ENVIRONMENT


WORKERS = "tests.distributed.workers_search:"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    def run(kind, world):
        return run_workers(WORKERS + "matrix", world, tmp_path_factory.mktemp(kind), kind)

    return {"alone": run("ddp", 1), "ddp": run("ddp", 2), "fsdp2": run("fsdp2", 2)}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["momo", "momo_adam", "averaging"])
def test_processes_find_the_cap_of_one(runs, kind, method):
    """Through the ramp, the way back and the warmup, with accumulation and clipping too; all ranks in the same bits."""
    (expected,), found = (run[method] for run in runs["alone"]), [run[method] for run in runs[kind]]
    torch.testing.assert_close(found[0]["log"], expected["log"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-8, atol=1e-9)
    assert expected["log"][:60, 0].argmin() == 0 and expected["log"][:60, 0].diff().lt(0).sum() == 1
    assert torch.equal(found[0]["log"], found[1]["log"])
    assert all(torch.equal(weight, found[1]["weights"][name]) for name, weight in found[0]["weights"].items())


def test_zero_finds_the_cap_of_one_process(runs, tmp_path):
    ranks = run_workers(WORKERS + "zero", 2, tmp_path, environment=ENVIRONMENT)
    for rank in ranks:
        torch.testing.assert_close(rank["log"], runs["ddp"][0]["single"]["log"], rtol=1e-3, atol=1e-5)
        assert torch.equal(rank["log"], ranks[0]["log"])


def test_replicas_of_shards_find_the_cap_of_one_process(tmp_path):
    """With empty shards, a frozen layer, and a branch without gradients on every other step."""
    ranks = run_workers(WORKERS + "replicated", 4, tmp_path)
    for dtype, expected in by_hand().items():
        found = ranks[0][dtype]
        # Gradients in bfloat16 round on every process by themselves.
        tolerance = 1e-7 if dtype == "torch.float64" else 0.3
        torch.testing.assert_close(found["sizes"], expected["sizes"], rtol=tolerance, atol=0)
        assert expected["back"] and expected["collectives"] == [0] and found["collectives"] == [1]
        for rank in ranks:
            assert rank[dtype]["back"] and torch.equal(rank[dtype]["sizes"], found["sizes"])
            assert all(torch.equal(w, rank[dtype]["weights"][n]) for n, w in found["weights"].items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("averaging, first", [("plain", "exp_avg"), ("averaging", "ahead")])
def test_a_search_is_taken_up_again_bit_for_bit(tmp_path, kind, averaging, first):
    """And one that is over is not begun again; by accelerate and by torch.distributed.checkpoint."""
    whole = run_workers(WORKERS + "saved", 2, tmp_path / "whole", kind, averaging)
    places = [f"{how}-{step}" for how in ("accelerate", "dcp") for step in (20, 70)]
    checkpoints = [tmp_path / "whole" / place for place in places]
    resumed = run_workers(WORKERS + "resumed", 2, tmp_path / "resumed", kind, averaging, *checkpoints)
    for before, runs in zip(whole, resumed):
        assert 20 < before["steps"] < 70 and before["names"] == sorted([first, "exp_avg_sq"])
        for place, after in zip(places, runs):
            assert torch.equal(before["log"][int(place.partition("-")[2]) :], after["log"]), place
            assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
            assert after["steps"] == before["steps"] and after["names"] == before["names"]
