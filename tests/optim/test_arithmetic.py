"""Arithmetic in Python's numbers against torch's, whatever the numbers; and what a step on a CPU makes of those that are no steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.steps import arithmetic
from momo_hf.optim.steps.arithmetic import Vector


NUMBERS = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, math.inf, -math.inf, math.nan]))
# Bounds are options of the user, which are finite.
BOUNDS = st.floats(-1e3, 1e3)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def check(found, expected):
    torch.testing.assert_close(double(found), expected, equal_nan=True, rtol=1e-14, atol=0)


@settings(deadline=None)
@given(x=NUMBERS, y=NUMBERS, bound=BOUNDS, weight=st.floats(0, 0.49))
def test_scalars(x, y, bound, weight):
    check(arithmetic.lerp(x, y, weight), arithmetic.lerp(double(x), double(y), double(weight)))
    if math.isfinite(x) and math.isfinite(y):  # as float32 adds
        x32, y32 = torch.tensor(x), torch.tensor(y)
        assert arithmetic.plus(x32.item(), y32.item()) == (x32 + y32).item()
    check(arithmetic.expm1(-abs(x)), torch.expm1(-double(x).abs()))
    check(arithmetic.root(x), double(x).sqrt())
    check(arithmetic.minimum(x, bound), torch.minimum(double(x), double(bound)))
    check(arithmetic.maximum(x, bound), torch.maximum(double(x), double(bound)))
    check(arithmetic.or_else(x, 2.0), double(x).nan_to_num(2.0, 2.0, 2.0))
    check(arithmetic.divided(x, abs(y)), double(x) / double(y).abs())
    check(arithmetic.quotient(x, y, 3.0), double(x) / double(y) if y > 0 else double(3.0))
    check(arithmetic.where(x < y, x, y), torch.where(double(x) < double(y), double(x), double(y)))
    for way in (arithmetic.minimum, arithmetic.maximum):
        check(way(double(x), bound).item(), way(double(x), double(bound)))
    assert arithmetic.all_finite([1.0, x, Vector([y, 2.0])]) == (math.isfinite(x) and math.isfinite(y))
    assert arithmetic.all_finite([double(1.0), double(x), double([y])]) == (math.isfinite(x) and math.isfinite(y))


@settings(deadline=None)
@given(numbers=st.lists(st.tuples(NUMBERS, st.floats(0, 1e3)), min_size=1, max_size=4), x=NUMBERS)
def test_vectors(numbers, x):
    ours, others = map(Vector, zip(*numbers))
    mine, theirs = map(double, zip(*numbers))
    for found, expected in (
        (ours * others, mine * theirs),
        (x * ours, x * mine),
        (ours / others, mine / theirs),
        (others / 2.0, theirs / 2.0),
        (1.0 - ours, 1.0 - mine),
        (1.0 + ours, 1.0 + mine),
        (arithmetic.where(False, ours, 0.5), torch.full_like(mine, 0.5)),
        (arithmetic.where(False, ours, others), theirs),
        (arithmetic.quotient(ours, 0.0, 1.0), torch.ones_like(mine)),
        (arithmetic.quotient(ours, 4.0, 1.0), mine / 4.0),
    ):
        check([*found], expected)
    check(others.max(), theirs.max())
    check(others.min(), theirs.min())
    torch.testing.assert_close(double(ours.sum()), mine.sum(), equal_nan=True)


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("wrong", [{"lr": -0.5, "weight_decay": 2.0}, {"lr": math.nan}, {"weight_decay": math.inf}])
def test_a_step_that_cannot_be_taken_is_dropped_and_does_not_raise(cls, averaging, wrong):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = cls([p], lr=0.1, weight_decay=0.1, averaging=averaging)
    for options, skipped in (({}, 0), (wrong, 1), ({"lr": 0.1, "weight_decay": 0.1}, 1)):
        optimizer.param_groups[0].update(options)
        before, p.grad = p.detach().clone(), torch.ones(2)
        optimizer.step(loss=1.0)
        assert optimizer.param_groups[0]["skipped"] == skipped
        assert torch.equal(p, before) == (options is wrong)


def test_what_float32_cannot_hold_is_dropped():
    """The model falls by all of the gap, twice the loss, which stands in `drift`."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Momo([p], lr=1e30, lb=-3e38)
    for loss, skipped in ((3e38, 1), (3e37, 1)):
        p.grad = torch.full((2,), 1e5)
        optimizer.step(loss=loss)
        group = optimizer.param_groups[0]
        assert group["drift"].isfinite() and group["skipped"] == skipped
    assert optimizer.param_groups[0]["drift"] < -3e38


def test_movements_that_float32_cannot_hold_do_not_end_the_training():
    p = nn.Parameter(torch.full((4,), -6e20))
    optimizer, skipped = Momo([p], lr=1e-20), []
    for moved, grad, loss in ((0, 1e17, 1.0), (6e20, 1e17, math.nan), (6e20, 1e17, math.nan), (0, 1.0, 1.0)):
        with torch.no_grad():
            p.add_(moved)
        p.grad = torch.full((4,), grad)
        optimizer.step(loss=loss)
        skipped.append(float(optimizer.param_groups[0]["skipped"]))
    assert skipped == [0, 1, 2, 2] and optimizer.param_groups[0]["drift"].isfinite()


@pytest.mark.parametrize("averaging", [False, True])
def test_float64_holds_more(averaging):
    for grad, loss in ((1e20, 1.0), (1.0, 1e40)):
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = Momo([p], lr=1e-2, averaging=averaging)
        for _ in range(3):
            p.grad = torch.full_like(p, grad)
            optimizer.step(loss=loss)
        assert optimizer.param_groups[0]["step"] == 3 and optimizer.param_groups[0]["skipped"] == 0


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize(
    "options", [{"lb": torch.tensor(0.1, dtype=torch.float64)}, {"betas": (torch.tensor(0.9), 0.999)}]
)
def test_options_in_tensors_are_numbers(averaging, options):
    ends = []
    for given_as in (options, {"lb": 0.1} if "lb" in options else {"betas": (0.9, 0.999)}):
        p = nn.Parameter(torch.ones(4))
        optimizer = MomoAdam([p], lr=1e-2, averaging=averaging, **given_as)
        for _ in range(3):
            p.grad = 0.1 * torch.ones(4)
            optimizer.step(loss=1.0)
        ends.append((p.detach(), *(optimizer.param_groups[0][name] for name in ("loss_avg", "effective_lr", "fstar"))))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_of_a_group_stay_in_their_tensors(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = MomoAdam([p], lr=0.1)
    group, names, held = optimizer.param_groups[0], ("step", "loss_avg", "drift", "effective_lr"), {}
    for step in (1, 2):
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        held = held if step == 2 else {name: group[name] for name in names}
    assert all(group[name] is held[name] and group[name].dtype == dtype for name in names)
    assert group["step"] == 2 and group["effective_lr"] > 0
