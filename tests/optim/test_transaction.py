"""A step writes all or nothing: whatever is not a usable number is skipped and counted, and leaves no trace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momo_hf.optim import Momo
from tests.optim.problem import both, least_squares, train


BAD = [float("nan"), float("inf"), -float("inf")]


def snapshot(optimizer, params):
    """Everything that a step may write, apart from the count of skipped steps."""
    group = optimizer.param_groups[0]
    kept = {
        name: v.clone() for name, v in group.items() if isinstance(v, torch.Tensor) and name not in ("lr", "skipped")
    }
    buffers = [value.clone() for p in params for value in optimizer.state[p].values()]
    return kept, buffers, [p.detach().clone() for p in params]


def unchanged(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return True


@both
@pytest.mark.parametrize("fstar", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    what=st.sampled_from(["loss", "grad", "clip_factor", "lr"]),
    value=st.sampled_from(BAD) | st.floats(-10.0, -1e-3),
    tensor=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_bad_numbers_change_nothing_and_are_counted(cls, fstar, what, value, tensor, decay):
    if what == "loss" and math.isfinite(value) or what == "grad" and math.isfinite(value):
        return  # a negative loss or gradient is a number like any other
    if what == "clip_factor" and value == math.inf:
        return  # no clipping
    params, backward = least_squares()
    optimizer = cls(params, lr=torch.tensor(0.1), weight_decay=decay, use_fstar=fstar)
    train(optimizer, backward, 2)
    loss = backward().detach()
    before = snapshot(optimizer, params)
    given_value = torch.tensor(value) if tensor else value
    if what == "loss":
        loss = given_value
    elif what == "grad":
        params[0].grad[0, 0] = value
    elif what == "clip_factor":
        optimizer.set_clip_factor(given_value)
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(value)
    optimizer.step(loss=loss)
    assert unchanged(before, snapshot(optimizer, params))
    assert optimizer.param_groups[0]["skipped"] == 1


def test_sums_that_overflow_are_skipped():
    """Every gradient is finite, their inner product is not."""
    params, backward = least_squares()
    optimizer = Momo(params, lr=0.1)
    train(optimizer, backward, 2)
    before = snapshot(optimizer, params)
    loss = backward().detach()
    params[0].grad.fill_(3e38)
    optimizer.step(loss=loss)
    assert unchanged(before, snapshot(optimizer, params)) and optimizer.param_groups[0]["skipped"] == 1


@both
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size, averaging", [(2e19, False), (3e38, False), (3e38, True)])
def test_gradients_too_large_to_be_squared_are_skipped(cls, known, size, averaging, monkeypatch):
    """Their v would be infinite for ever, and the direction 0. Other processes may hold the rest, so that nobody knows."""
    if not known:
        monkeypatch.setattr("momo_hf.optim.steps.driver.is_known", lambda *args: False)
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, averaging=averaging)
    train(optimizer, backward, 2)
    before = snapshot(optimizer, params)
    loss = backward().detach()
    params[0].grad[0, 0] = size
    optimizer.step(loss=loss)
    assert unchanged(before, snapshot(optimizer, params)) and optimizer.param_groups[0]["skipped"] == 1
    params[0].grad[0, 0] = float("nan")
    optimizer.step(loss=loss)
    assert unchanged(before, snapshot(optimizer, params)) and optimizer.param_groups[0]["skipped"] == 2


@both
def test_a_norm_that_overflowed_is_skipped(cls):
    """Clipping by an infinite norm has set the gradients to 0."""
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    train(optimizer, backward, 2)
    before = snapshot(optimizer, params)
    loss = backward().detach()
    for p in params:
        p.grad.zero_()
    optimizer.loss_source = lambda *given: (loss, torch.tensor(0.0), True)
    optimizer.step()
    assert unchanged(before, snapshot(optimizer, params)) and optimizer.param_groups[0]["skipped"] == 1


@both
def test_a_tiny_slope_is_a_capped_step(cls):
    """A gap over a slope beyond the largest float32 is no reason to skip: the cap decides."""
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    loss = backward().detach()
    for p in params:
        p.grad.fill_(1e-21)
    optimizer.step(loss=loss * 1e30)
    group = optimizer.param_groups[0]
    assert group["skipped"] == 0 and group["capped"] == 1 and group["polyak_lr"].isfinite()


@both
def test_losses_in_low_precision_are_averaged_in_float32(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    backward()
    optimizer.step(loss=torch.tensor(1.0, dtype=torch.bfloat16))
    backward()
    optimizer.step(loss=torch.tensor(1.0078125, dtype=torch.bfloat16))
    first = 1.0 if not optimizer.param_groups[0]["bias_correction"] else 0.1
    assert optimizer.param_groups[0]["loss_avg"].dtype == torch.float32
    assert float(optimizer.param_groups[0]["loss_avg"]) == pytest.approx(0.9 * first + 0.1 * 1.0078125, rel=1e-6)


@both
def test_changing_the_bound_moves_the_estimate(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, use_fstar=True)
    train(optimizer, backward, 3)
    optimizer.set_lb(5.0)
    assert optimizer.param_groups[0]["fstar"] == 5.0
