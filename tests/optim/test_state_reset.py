"""State that something else took away: all of it makes a new optimizer, a part of it late parameters."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import both, least_squares, train


def clear(optimizer):
    optimizer.state.clear()


def replace(optimizer):
    optimizer.state = defaultdict(dict)


def delete(optimizer):
    for p in list(optimizer.state):
        del optimizer.state[p]


def empty(optimizer):
    for p in optimizer.state:
        optimizer.state[p] = {}


def load_nothing(optimizer):
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})


KINDS = [
    {"lr": 1e-2},
    {"lr": 1e3, "lb": -0.1, "use_fstar": True},
    {"lr": 0.1, "averaging": True},
    {"lr": "auto", "averaging": True},
]


@both
@pytest.mark.parametrize("take_away", [clear, replace, delete, empty, load_nothing])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_new_optimizer(cls, take_away, options):
    searches = options["lr"] == "auto"
    dtype = torch.bfloat16 if searches else torch.float32
    params, backward = least_squares(dtype)
    optimizer = cls(params, **options)
    train(optimizer, backward, 70 if searches else 10)
    take_away(optimizer)
    others, again = least_squares(dtype)
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    new = cls(others, **options)
    assert optimizer.searching == new.searching and optimizer.search == new.search
    for steps in (5, 67 if searches else 5):
        train(optimizer, backward, steps)
        train(new, again, steps)
        assert all(map(torch.equal, params, others))
    group, twin = optimizer.param_groups[0], new.param_groups[0]
    scalars = {name: value for name, value in twin.items() if isinstance(value, torch.Tensor)}
    torch.testing.assert_close({name: group[name] for name in scalars}, scalars, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda optimizer: optimizer.searching,
        lambda optimizer: optimizer.search,
        lambda optimizer: float(optimizer.cap()),
        lambda optimizer: float(optimizer.state_dict()["param_groups"][0]["search_steps"]),
        lambda optimizer: float(copy.deepcopy(optimizer).param_groups[0]["search_steps"]),
    ],
)
def test_whoever_looks_first_sees_a_new_one(read):
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto", averaging=True)
    train(optimizer, backward, 80)
    optimizer.state.clear()
    assert read(optimizer) == read(MomoAdam(params, lr="auto", averaging=True))


@both
def test_what_was_saved_before_and_what_is_saved_then(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=10.0)
    train(optimizer, backward, 5)
    saved = optimizer.state_dict()
    optimizer.state.clear()
    between, copied = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer)
    assert between["state"] == {} and between["param_groups"][0]["step"] == copied.param_groups[0]["step"] == 0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["step"] == 5 and optimizer.param_groups[0]["loss_avg"] > 0


def test_state_that_is_asked_for_when_it_was_emptied_is_new():
    """By torch.distributed.checkpoint, with a step that has no loss and gradients of 0."""
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=10.0)
    train(optimizer, backward, 5)
    optimizer.state.clear()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    group = optimizer.param_groups[0]
    assert optimizer.state and group["step"] == group["loss_avg"] == group["drift"] == 0


def test_an_average_begins_at_the_average_when_it_is_taken_away_there():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=0.1, averaging=True)
    train(optimizer, backward, 10)
    optimizer.eval()
    x = [p.detach().clone() for p in params]
    optimizer.state.clear()
    optimizer.train()
    assert all(map(torch.equal, params, x))
    train(optimizer, backward, 1)
    assert optimizer.param_groups[0]["step"] == 1


def test_a_part_takes_adams_steps_at_the_cap_as_torchs_optimizer_does():
    ours, theirs = ([nn.Parameter(torch.full((3,), float(i))) for i in range(3)] for _ in range(2))
    momo, adam = MomoAdam(ours, lr=1e-2, lb=-1e6), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for step in range(20):
        if step == 10:
            for optimizer, params in ((momo, ours), (adam, theirs)):
                del optimizer.state[params[1]]
                optimizer.state[params[2]] = {}
        for p, q in zip(ours, theirs):
            p.grad = torch.sin(q.detach() + step)
            q.grad = p.grad.clone()
        momo.step(loss=1.0)
        adam.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert momo.state[ours[1]]["start"] is momo.state[ours[2]]["start"] and momo.state[ours[1]]["start"] == 10


def test_a_part_begins_a_new_average():
    params, backward = least_squares(torch.float64)
    optimizer = MomoAdam(params, lr=0.1, averaging=True)
    train(optimizer, backward, 10)
    del optimizer.state[params[0]]
    start = params[0].detach().clone()
    train(optimizer, backward, 1)
    z = params[0].detach() + optimizer.state[params[0]]["ahead"]
    optimizer.eval()
    torch.testing.assert_close(params[0].detach(), z, rtol=1e-12, atol=0)  # the average of one z
    size = optimizer.param_groups[0]["effective_lr"]
    torch.testing.assert_close((z - start).abs(), torch.full_like(z, float(size)), rtol=1e-4, atol=0)


def forget(optimizer, p):
    del optimizer.state[p]


def zero_in_place(optimizer, p):
    optimizer.state[p]["exp_avg"].zero_()


def put_another(optimizer, p):
    optimizer.state[p]["exp_avg"] = torch.zeros_like(p)


@both
@pytest.mark.parametrize("take_away", [forget, zero_in_place, put_another])
def test_weights_that_are_restarted_with_their_momentum_are_no_movement(cls, take_away):
    """LoRA merged and begun anew, rows pruned: the model keeps its height, and has no slope along these parameters."""
    params, backward = least_squares(torch.float64)
    optimizer = cls(params, lr=10.0)
    train(optimizer, backward, 6)
    drift = optimizer.param_groups[0]["drift"].clone()
    take_away(optimizer, params[0])
    with torch.no_grad():
        params[0].normal_(generator=torch.Generator().manual_seed(7))
    saved = optimizer.state_dict()["param_groups"][0]["drift"].clone()
    before = [p.detach().clone() for p in params]
    train(optimizer, backward, 1)
    moved = sum((optimizer.state[p]["exp_avg"] * (p.detach() - x)).sum() for p, x in zip(params, before))
    torch.testing.assert_close(optimizer.param_groups[0]["drift"], 0.9 * drift + moved, rtol=1e-9, atol=1e-12)
    assert saved == drift


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "averaging": True}, {"lr": "auto"}], ids=str)
def test_a_look_at_state_that_is_not_there_leaves_no_trace(options):
    """torch's state is a `defaultdict`, and has an entry of what was asked for."""
    runs = []
    for look in (False, True):
        params, backward = least_squares()
        optimizer = Momo(params, **options)
        params[1].requires_grad_(False)
        for _ in range(2):
            for p in params:
                if look:
                    optimizer.state[p]
            train(optimizer, backward, 3)
        if look:
            optimizer.state[params[1]]
        params[1].requires_grad_(True)
        train(optimizer, backward, 3)
        runs.append(np.concatenate([p.detach().numpy().ravel() for p in params]))
    assert np.array_equal(*runs)
