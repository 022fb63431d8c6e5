"""Losses are averaged over the processes over which their gradients are, and over no others."""

import pytest
import torch

from tests.distributed.launch import run_workers


WORKERS = "tests.distributed.workers_processes:"
MESHES = "tests.distributed.workers_meshes:"
KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_workers(WORKERS + "suite", 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_workers(WORKERS + "suite", 2, tmp_path_factory.mktemp("two"))


def assert_same_steps(found, expected):
    torch.testing.assert_close(found["log"], expected["log"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 2])
def test_closures_take_the_steps_of_one_process(alone, two, clip, parts):
    case = f"closure {clip} {parts}"
    assert_same_steps(two[0][case], alone[case])
    assert torch.equal(two[0][case]["weights"], two[1][case]["weights"])


def test_a_closure_with_a_backward_of_its_own_is_averaged_too(alone, two):
    assert_same_steps(two[0]["bare closure"], alone["bare closure"])
    assert torch.equal(two[0]["bare closure"]["weights"], two[1]["bare closure"]["weights"])


@KINDS
def test_a_batch_that_is_thrown_away_in_place_takes_its_loss_with_it(alone, two, kind):
    for rank in two:
        assert rank[f"thrown away {kind}"] == pytest.approx(alone["thrown away ddp"], rel=1e-6)


@KINDS
def test_micro_batches_that_are_clipped_one_by_one(alone, two, kind):
    for run in (*two, alone):
        case = run.get(f"clipped micro-batches {kind}", alone["clipped micro-batches ddp"])
        assert case["found"] == pytest.approx(case["right"], rel=1e-12)


@pytest.mark.parametrize("where, averaged", [("forward", False), ("backward", True), ("triggered", True)])
def test_the_forward_pass_decides_whether_gradients_are_averaged(two, where, averaged):
    first, second = (rank["divided"][where] for rank in two)
    assert torch.allclose(first["gradient"], second["gradient"]) == averaged
    for rank in (first, second):
        right = (first["loss"] + second["loss"]) / 2 if averaged else rank["loss"]
        assert rank["found"] == pytest.approx(right)


@KINDS
def test_losses_by_hand_are_averaged_as_gradients_are(alone, two, kind):
    for rank in two:
        assert_same_steps(rank[f"by hand {kind}"], alone["by hand ddp"])
    assert torch.equal(two[0][f"by hand {kind}"]["weights"], two[1][f"by hand {kind}"]["weights"])


def test_two_models_take_in_their_own_losses(two):
    for rank in two:
        assert rank["two_models"]["found"] == pytest.approx(rank["two_models"]["right"], rel=1e-12)


@KINDS
@pytest.mark.parametrize("way", ["model", "in place", "optimizer", "kept"])
def test_the_loss_of_a_window_goes_where_its_gradients_go(alone, two, kind, way):
    """FSDP2 keeps what it has not averaged out of reach of zero_grad; then the loss stays too."""
    kept, half = alone["dropped ddp"]["kept"], alone["dropped ddp"]["model"]
    for rank in two:
        found = rank[f"dropped {kind}"][way]
        gradient_was_kept = torch.allclose(found["gradient"], kept["gradient"])
        assert gradient_was_kept or torch.allclose(found["gradient"], half["gradient"])
        assert gradient_was_kept == (way == "kept" or kind == "fsdp2")
        expected = kept if gradient_was_kept else half
        assert found["scalars"] == pytest.approx(expected["scalars"], rel=1e-6)


def test_gradients_that_stay_local_have_local_losses(two):
    logs = [rank["local_sgd"] for rank in two]
    for log in logs:
        taken_in, expected = 0.0, []
        for loss in log[:, 0].tolist():
            taken_in = 0.9 * taken_in + 0.1 * loss
            expected.append(taken_in)
        assert log[:, 1].tolist() == pytest.approx(expected)
    assert not torch.allclose(logs[0], logs[1])


def test_no_sync_and_sync_by_turns(two):
    first, second = (rank["no_sync"] for rank in two)
    for mine in (first, second):
        assert mine[0, 1] == pytest.approx(0.1 * float(mine[0, 0]))
        mean = float(first[1, 0] + second[1, 0]) / 2
        assert mine[1, 1] == pytest.approx(0.9 * float(mine[0, 1]) + 0.1 * mean)


def test_two_optimizers_cost_one_collective(two):
    assert two[0]["events"] == ["all_reduce 2 async", "backward"]


def test_join_is_refused_before_the_first_step(two):
    for rank in two:
        message, steps = rank["join"]
        assert "torch's Join" in message and "even_batches=True" in message and steps == 0


def test_an_accelerator_of_one_process_asks_no_other(alone, tmp_path):
    """A world of two processes of which one trains by itself: any collective would wait for ever."""
    found, _ = run_workers(WORKERS + "one_of_two", 2, tmp_path)
    assert found == pytest.approx(alone["one of one"], rel=1e-12)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    (expected,) = run_workers(MESHES + "without_mesh", 1, tmp_path_factory.mktemp("flat"))
    return expected, run_workers(MESHES + "meshes", 4, tmp_path_factory.mktemp("mesh"))


@pytest.mark.parametrize("mesh", ["tp", "dp x tp", "cp", "dp x cp", "dp x dp"])
def test_parallelism_of_accelerate_takes_the_steps_of_one_process(meshes, mesh):
    expected, ranks = meshes
    for rank in ranks:
        assert_same_steps(rank[mesh], expected)
        assert torch.equal(rank[mesh]["log"], ranks[0][mesh]["log"])
