"""What a step that averages costs, and that it writes all or nothing."""

import math

import pytest
import torch
from torch import nn

from momo_hf.integrations.accelerate import momo_metrics
from momo_hf.optim import Momo, MomoAdam
from tests.averaging_reference import trained
from tests.optim.problem import as_on_a_device, both, least_squares
from tests.optim.test_cost import Calls, NoReads
from tests.optim.test_transaction import snapshot, unchanged


# ---- What it costs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_that_of_adam(dtype):
    optimizer, params, _ = trained(dtype)
    names = {"ahead", "exp_avg_sq"} | ({"y"} if dtype == torch.bfloat16 else set())
    assert all(set(optimizer.state[p]) == names for p in params)
    assert {v.dtype for p in params for v in optimizer.state[p].values()} == {torch.float32}
    momentum = Momo(params, averaging=True)
    momentum.step(loss=1.0)
    assert set(momentum.state[params[0]]) == names - {"exp_avg_sq"}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_value_leaves_the_device(cls, dtype, weight_decay, monkeypatch):
    as_on_a_device(monkeypatch)
    params = [nn.Parameter(torch.randn(8, 5).to(dtype)) for _ in range(6)]
    optimizer = cls(params, lr=0.1, averaging=True, weight_decay=weight_decay)
    loss, clip = torch.tensor(2.0), torch.tensor(0.5)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step(loss=loss)
    with NoReads():
        optimizer.set_clip_factor(clip)
        optimizer.step(loss=loss)
        optimizer.eval()
        optimizer.train()
        params[0].grad.fill_(float("nan"))
        optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["skipped"] == 1


def test_calls_do_not_grow_with_the_number_of_tensors():
    counts = set()
    for count in (10, 1000):
        params = [nn.Parameter(torch.randn(8, 5)) for _ in range(count)]
        optimizer = MomoAdam(params, lr=0.1, averaging=True, weight_decay=0.1)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(loss=1.0)
        with Calls() as calls:
            optimizer.step(loss=1.0)
            optimizer.eval()
        counts.add(calls.count)
    assert len(counts) == 1, counts


# ---- All or nothing ----


@both
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "grad", "clip_factor", "lr"])
def test_bad_numbers_change_nothing_and_are_counted(cls, decay, value, what):
    if (what, value) == ("clip_factor", math.inf):
        return  # no clipping
    params, backward = least_squares()
    optimizer = cls(params, lr=torch.tensor(0.1), weight_decay=decay, averaging=True)
    for _ in range(3):
        optimizer.step(loss=backward())
    loss = backward()
    before = snapshot(optimizer, params)
    if what == "loss":
        loss = torch.tensor(value)
    elif what == "grad":
        params[0].grad[0, 0] = value
    elif what == "clip_factor":
        optimizer.set_clip_factor(value)
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(value)
    optimizer.step(loss=loss)
    assert unchanged(before, snapshot(optimizer, params))
    assert optimizer.param_groups[0]["skipped"] == 1


@both
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_numbers_that_overflow_change_nothing(cls, eps):
    """The gradient is finite, its square, which would be stored, is not. With eps=0 and no gradient D^{-1} is not either."""
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, averaging=True, **({"eps": eps} if cls is MomoAdam else {}))
    for _ in range(2):
        loss = backward()
        optimizer.step(loss=loss)
    before = snapshot(optimizer, params)
    params[0].grad[0, 0] = 3e38
    optimizer.step(loss=loss)
    params[0].grad.zero_()
    optimizer.state[params[0]].get("exp_avg_sq", torch.ones(())).zero_()
    optimizer.step(loss=torch.tensor(math.nan))
    if cls is MomoAdam:
        optimizer.state[params[0]]["exp_avg_sq"].copy_(before[1][1])
    assert unchanged(before, snapshot(optimizer, params))
    assert optimizer.param_groups[0]["skipped"] == 2


def test_a_loss_below_its_bound_is_counted_as_a_stall():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=0.1, averaging=True, lb=1e6)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        optimizer.step(loss=backward())
    assert optimizer.param_groups[0]["stalled"] == 3 and all(map(torch.equal, params, before))


def test_the_numbers_for_the_logs():
    params, backward = least_squares(torch.float64)
    optimizer = MomoAdam(params, lr=1e-2, averaging=True)
    losses = []
    for _ in range(5):
        losses.append(float(backward().detach()))
        optimizer.step(loss=losses[-1])
    metrics = momo_metrics(optimizer)
    expected = sum(0.1 * 0.9 ** (4 - i) * f for i, f in enumerate(losses)) / (1 - 0.9**5)
    assert metrics["momo/loss_avg"] == pytest.approx(expected)
    assert metrics["momo/effective_lr"] == 1e-2 < metrics["momo/polyak_lr"]
