"""Weights that change between a load, or a copy, and the next step are followed as in a run that nothing interrupts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import both, least_squares, train


METHODS = [
    (Momo, {"lr": 10.0}),
    (Momo, {"lr": 10.0, "weight_decay": 0.01}),
    (MomoAdam, {"lr": 10.0}),
    (MomoAdam, {"lr": 10.0, "weight_decay": 0.01, "divide": False}),
]


def change(params):
    with torch.no_grad():
        params[0].mul_(0.9).add_(0.1)


def loaded(cls, options, params, optimizer, weights_first):
    others, _ = least_squares(params[0].dtype, seed=1)
    resumed, state = cls(others, **options), copy.deepcopy(optimizer.state_dict())
    if not weights_first:
        resumed.load_state_dict(state)
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    if weights_first:
        resumed.load_state_dict(state)
    return others, resumed


@pytest.mark.parametrize("cls, options", METHODS)
@pytest.mark.parametrize("how", ["weights first", "state first", "deepcopy", "pickle"])
@pytest.mark.parametrize("before", [False, True], ids=["", "changed before too"])
def test_changes_before_the_first_step(cls, options, how, before):
    params, backward = least_squares(torch.float64)
    optimizer = cls(params, **options)
    train(optimizer, backward, 6)
    if before:
        change(params)
    if how == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    elif how == "pickle":
        others, resumed = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        others, resumed = loaded(cls, options, params, optimizer, how == "weights first")
    change(params)
    change(others)
    for _ in range(6):
        loss = backward().detach()
        for p, q in zip(params, others):
            q.grad = p.grad.clone()
        for o in (optimizer, resumed):
            o.step(loss=loss)
        torch.testing.assert_close(others, params, rtol=1e-9, atol=1e-12)
        sizes = [float(o.param_groups[0]["effective_lr"]) for o in (optimizer, resumed)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-7) and "left" not in resumed.param_groups[0]


@both
def test_changes_before_the_first_step_in_bfloat16(cls):
    params, backward = least_squares(torch.bfloat16)
    optimizer = cls(params, lr=10.0)
    train(optimizer, backward, 6)
    others, resumed = loaded(cls, {"lr": 10.0}, params, optimizer, True)
    change(params)
    change(others)
    loss = backward().detach()
    for p, q in zip(params, others):
        q.grad = p.grad.clone()
    for o in (optimizer, resumed):
        o.step(loss=loss)
    drifts = [o.param_groups[0]["drift"] for o in (optimizer, resumed)]
    torch.testing.assert_close(drifts[1], drifts[0], rtol=1e-5, atol=1e-7)


@both
def test_a_state_of_before_loads_and_goes_on_without_it(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=10.0)
    train(optimizer, backward, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["left"]
    resumed = cls(params, lr=10.0)
    resumed.load_state_dict(state)
    change(params)
    drift = resumed.param_groups[0]["drift"].clone()
    x = [p.detach().clone() for p in params]
    train(resumed, backward, 1)
    moved = sum((resumed.state[p]["exp_avg"] * (p.detach() - y)).sum() for p, y in zip(params, x))
    torch.testing.assert_close(resumed.param_groups[0]["drift"], 0.9 * drift + moved, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_an_average_in_bfloat16_goes_on_from_the_weights_that_are_there(cls, how):
    params, backward = least_squares(torch.bfloat16)
    optimizer = cls(params, lr=1e-3, averaging=True)
    train(optimizer, backward, 5)
    if how == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = cls(others, lr=1e-3, averaging=True)
        resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        others[0].fill_(3.0)
    for o in (optimizer, resumed):
        for p in o.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        o.step(loss=0.0)
    assert (others[0] - 3).abs().max() < 0.05
    assert torch.equal(resumed.state[others[1]]["y"], optimizer.state[params[1]]["y"])  # not rounded
