"""MomoMuon takes the steps of one process wherever its matrices lie."""

import pytest
import torch

from tests.distributed.launch import run_workers
from tests.distributed.workers_muon import OPTIONS


WORKERS = "tests.distributed.workers_muon:"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    alone = run_workers(WORKERS + "run", 1, tmp_path_factory.mktemp("alone"))[0]
    two = run_workers(WORKERS + "run", 2, tmp_path_factory.mktemp("two"), "fsdp2", "replicas")
    four = run_workers(WORKERS + "run", 4, tmp_path_factory.mktemp("four"), "hsdp", "rows and columns")
    return alone, two, four


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["fsdp2", "replicas", "hsdp", "rows and columns"])
def test_the_steps_are_those_of_one_process(runs, kind, options):
    alone, two, four = runs
    for rank in two if f"{kind} {options}" in two[0] else four:
        found, expected = rank[f"{kind} {options}"], alone[options]
        torch.testing.assert_close(found["log"], expected["log"], rtol=1e-7, atol=0)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-7, atol=1e-9)


def test_replicas_stay_equal_to_the_last_bit(runs):
    first, second = runs[1]
    for options in OPTIONS:
        for name, weight in first[f"replicas {options}"]["weights"].items():
            assert torch.equal(second[f"replicas {options}"]["weights"][name], weight)


def test_every_process_computes_the_directions_of_its_share(tmp_path):
    first, second = run_workers(WORKERS + "shares", 2, tmp_path)
    assert sorted(first + second) == sorted([(2, 5, 5), (1, 5, 5), (1, 11, 5), (1, 2, 1, 3)])
