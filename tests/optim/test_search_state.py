"""A search for the cap beside everything else that happens to an optimizer: checkpoints, odd parameters, groups, bad losses."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import both, least_squares, train
from tests.optim.test_search import problem, search


def advance(optimizer, backward, first, last):
    for k in range(first, last + 1):
        optimizer.step(loss=backward(k % 70)[0])


def same(optimizer, params, other, others):
    """Whether two optimizers and their parameters are the same in every bit."""
    for p, q in zip(params, others):
        assert torch.equal(p, q) and optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(value, other.state[q][name]) for name, value in optimizer.state[p].items())
    for group, twin in zip(optimizer.param_groups, other.param_groups):
        tensors = {name: value for name, value in group.items() if isinstance(value, torch.Tensor)}
        torch.testing.assert_close(tensors, {name: twin[name] for name in tensors}, rtol=0, atol=0, equal_nan=True)
    return True


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 1, 20, "at the end", "after"])
@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_it_is_taken_up_again_bit_for_bit(cls, dtype, at, how):
    steps = search(cls((made := problem(dtype=dtype))[2], lr="auto"), made[3])
    at = {"at the end": steps, "after": steps + 5}.get(at, at)
    _, _, params, backward = problem(dtype=dtype)
    optimizer = cls(params, lr="auto")
    advance(optimizer, backward, 1, at)
    _, _, others, again = problem(dtype=dtype)
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    if how == "state_dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = cls(others, lr="auto")
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:
        resumed = pickle.loads(pickle.dumps(optimizer))
        loaded = [p for group in resumed.param_groups for p in group["params"]]
        for group in resumed.param_groups:
            group["params"] = others
        resumed.state = type(resumed.state)(
            dict, {q: resumed.state[p] for p, q in zip(loaded, others) if p in resumed.state}
        )
    advance(optimizer, backward, at + 1, steps + 12)
    advance(resumed, again, at + 1, steps + 12)
    assert same(optimizer, params, resumed, others)
    assert optimizer.param_groups[0]["step"] == 12 and "origin" not in optimizer.state[params[0]]


def test_a_saved_state_brings_its_own_kind_of_lr():
    params, backward = least_squares()
    auto, given = MomoAdam(params, lr="auto"), MomoAdam(params, lr=0.02)
    train(auto, backward, 80)
    train(given, backward, 3)
    saved = copy.deepcopy(auto.state_dict()), copy.deepcopy(given.state_dict())
    auto.load_state_dict(saved[1])
    assert auto.search is None and auto.param_groups[0]["lr"] == 0.02
    train(auto, backward, 1)
    assert auto.param_groups[0]["step"] == 4
    given.load_state_dict(saved[0])
    train(given, backward, 1)
    assert given.search.steps == 60 and given.param_groups[0]["step"] == 21
    assert given.param_groups[0]["lr"] == given.search.cap


def test_a_state_that_lost_its_origin_is_refused():
    """As when a checkpoint is filled into the tensors of an optimizer whose search is over: there the two are one."""
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    train(optimizer, backward, 5)
    for lose in (lambda entry: {**entry, "origin": entry["exp_avg"]}, lambda entry: {"exp_avg": 0, "exp_avg_sq": 0}):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"] = {key: lose(entry) for key, entry in state["state"].items()}
        with pytest.raises(ValueError, match="Load it into a fresh optimizer"):
            MomoAdam(params, lr="auto").load_state_dict(state)


def test_state_that_was_only_asked_for_is_not_where_to_go_back_to():
    """torch.distributed.checkpoint makes state before the weights are loaded."""
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    optimizer.param_groups[0]["lr"] = 1e-2
    with torch.no_grad():
        params[0].fill_(0.5)
    while optimizer.search.cap is None:
        train(optimizer, backward, 1)
    assert torch.equal(params[0], torch.full_like(params[0], 0.5))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_parameter_goes_back_to_its_bits(cls, dtype):
    """Odd shapes, one that joins late, one without a gradient now and then, and a frozen one."""
    torch.manual_seed(0)
    shapes = {"plain": (4, 3), "scalar": (), "empty": (0,), "late": (5,), "rare": (3,), "frozen": (2,)}
    params = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    params["strided"] = nn.Parameter(torch.randn(5, 3).to(dtype).t())
    params["frozen"].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = cls(params.values(), lr="auto")
    for k in range(1, 70):
        loss = 0.0
        for name, p in params.items():
            absent = name == "frozen" or name == "late" and k < 9 or name == "rare" and k % 3 == 0
            p.grad = None if absent else (p.detach() - 1)
            loss = loss if absent else loss + 0.5 * (p.detach().double() - 1).square().sum()
        optimizer.step(loss=loss)
        if optimizer.search.cap is not None:
            break
        moved = {name for name, p in params.items() if not torch.equal(p, before[name])}
        assert k < 40 or moved == set(shapes) - {"empty", "frozen"} | {"strided"}
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    assert not any("start" in entry for entry in optimizer.state.values())
    for p in params.values():
        if p in optimizer.state:
            assert not any(value.any() for key, value in optimizer.state[p].items() if key != "origin")


def test_an_added_group_joins_the_search_and_the_cap():
    params, backward = least_squares()
    optimizer = MomoAdam(params[:1], lr="auto")
    params[1].requires_grad_(False)
    train(optimizer, backward, 5)
    optimizer.add_param_group({"params": params[1:]})
    params[1].requires_grad_(True)
    start = params[1].detach().clone()
    train(optimizer, backward, 40)
    assert not torch.equal(params[1], start)
    train(optimizer, backward, 15)
    assert torch.equal(params[1], start)
    optimizer.param_groups[1]["lr"] *= 0.5
    train(optimizer, backward, 80)
    assert optimizer.param_groups[1]["effective_lr"] == 0.5 * optimizer.param_groups[0]["effective_lr"] > 0


@pytest.mark.parametrize("lrs", [("auto", 0.1), (0.1, "auto")])
def test_some_groups_with_a_number_are_refused(lrs):
    params, _ = least_squares()
    with pytest.raises(ValueError, match='`lr` must be "auto" in all parameter groups or in none'):
        MomoAdam([{"params": [p], "lr": lr} for p, lr in zip(params, lrs)])


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="`lr` must be a number or \"auto\", got 'automatic'"):
        MomoAdam(least_squares()[0], lr="automatic")


@both
def test_losses_that_are_not_finite_end_it_and_one_bad_batch_does_not(cls):
    params, backward = least_squares()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, lr="auto")
    train(optimizer, backward, 20)
    backward()
    optimizer.step(loss=float("nan"))
    train(optimizer, backward, 1)
    assert optimizer.search.steps == 21 and optimizer.param_groups[0]["skipped"] == 1
    for _ in range(2):
        backward()
        for p in params:
            p.grad.fill_(float("inf"))
        optimizer.step(loss=float("inf"))
    assert optimizer.search.reason == "the loss or a gradient was not finite"
    assert all(torch.equal(p, x) for p, x in zip(params, before))
    losses = train(optimizer, backward, 200)
    assert losses[-1] < losses[0] and optimizer.param_groups[0]["step"] == 200


@pytest.mark.parametrize("seed", range(10))
def test_noise_ends_at_a_cautious_cap(seed):
    """Gradients that know nothing of the loss: a cap far below the steps that were tried, and words about it."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(30, 10)), nn.Parameter(torch.randn(10))]
    optimizer = MomoAdam(params, lr="auto")
    for _ in range(60):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(loss=1 + 0.1 * torch.randn(()))
    assert optimizer.search.reason == "nothing found" and 1e-5 < optimizer.search.cap <= 3e-4


def test_what_was_found_is_said_once(caplog):
    with caplog.at_level(logging.INFO):
        for cls, lr in ((Momo, "auto"), (MomoAdam, "auto"), (MomoAdam, 0.1)):
            params, backward = least_squares()
            train(optimizer := cls(params, lr=lr), backward, 70)
            optimizer.state_dict()
            optimizer.load_state_dict(optimizer.state_dict())
            train(optimizer, backward, 5)
    found = [record.message for record in caplog.records if "search: cap" in record.message]
    assert found == [
        "search: cap 0.051 found after 41 steps: longer ones overshoot.",
        "search: cap 0.16 found after 60 steps, the whole ramp: no step of it was much too long.",
    ]


def test_parameters_changed_from_outside_after_it_are_followed():
    """The way back is no movement that the model takes in, and later ones are."""
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    train(optimizer, backward, 61)
    drift = optimizer.param_groups[0]["drift"].clone()
    assert -1e-2 < drift < 0
    with torch.no_grad():
        params[0].add_(1.0)
    moved = optimizer.state[params[0]]["exp_avg"].sum()
    x = [p.detach().clone() for p in params]
    train(optimizer, backward, 1)
    step = sum((optimizer.state[p]["exp_avg"] * (p.detach() - y)).sum() for p, y in zip(params, x))
    torch.testing.assert_close(optimizer.param_groups[0]["drift"], 0.9 * (drift + moved) + step, rtol=1e-4, atol=1e-6)


@both
def test_an_lr_that_is_no_number_drops_a_step_of_it(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr="auto")
    train(optimizer, backward, 20)
    before, good = [p.detach().clone() for p in params], optimizer.param_groups[0]["lr"]
    for lr, steps, skipped in ((float("nan"), 20, 1), (good, 21, 1)):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, backward, 1)
        assert optimizer.search.steps == steps and optimizer.param_groups[0]["skipped"] == skipped
        assert all(map(torch.equal, params, before)) == (steps == 20)
