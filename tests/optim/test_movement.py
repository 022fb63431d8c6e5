"""The model follows what the parameters did: rounding, and changes from outside, beside an explicit float64 version.

The version is given the parameters as they are before every step, and the same losses and gradients.
"""

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import compile_from
from tests.reference import Reference


def problem(dtype=torch.float64, seed=0):
    """An embedding and a vector in a curved loss; small pieces of a cut tensor and a packed one."""
    generator = torch.Generator().manual_seed(seed)
    table = nn.Parameter(torch.randn(12, 5, generator=generator).to(dtype))
    bias = nn.Parameter(torch.randn(5, generator=generator).to(dtype))
    target = torch.randn(4, 5, generator=generator).to(dtype)

    def backward(step):
        table.grad = bias.grad = None
        rows = table[[step % 11, (step + 3) % 11, (step + 7) % 11, 11]]
        loss = (torch.tanh(rows) * rows + bias - target).square().mean()
        loss.backward()
        return loss.detach()

    return [table, bias], backward


def reference_for(optimizer, cls, params):
    group = optimizer.param_groups[0]
    adam = cls is not Momo
    arrays = [[p.detach().double().numpy().copy() for p in params]]
    return Reference(
        arrays, [group["lr"]], [group["weight_decay"]], beta2=group["betas"][1] if adam else None,
        bias_correction=adam, divide=group["divide"], use_fstar=group["use_fstar"],
    )  # fmt: skip


def step_sizes(cls, dtype, after_step, steps=40, scale=1.0, **options):
    """Step sizes of the optimizer and of the version that is given the parameters."""
    params, backward = problem(dtype)
    optimizer = cls(params, **options)
    reference = reference_for(optimizer, cls, params)
    ours, right = [], []
    for step in range(steps):
        loss = scale * backward(step)
        for i, p in enumerate(params):
            reference.params[0][i] = p.detach().double().numpy().copy()
        reference.step(float(loss), [[p.grad.double().numpy() for p in params]])
        optimizer.step(loss=loss)
        ours.append(float(optimizer.param_groups[0]["effective_lr"]))
        right.append(reference.tau * reference.rho)
        with torch.no_grad():
            after_step(step, params)
    return np.array(ours), np.array(right)


START = problem()[0][0].detach()


def clamp(step, params):
    params[0].clamp_(-0.5, 0.5)


def sphere(step, params):
    params[0].div_(params[0].norm())


def restore_rows(step, params):
    params[0][:11] = START[:11].to(params[0].dtype)


def mask(step, params):
    params[0].mul_(torch.arange(60).view(12, 5) % 3 > 0)


def start_anew(step, params):
    if step == 20:
        nn.init.normal_(params[0])


def local_sgd(step, params):
    if step % 4 == 3:
        for p in params:
            p.data = 0.8 * p.data


def other_memory(step, params):
    params[0].set_(params[0].clone())


CHANGES = [clamp, sphere, restore_rows, mask, start_anew, local_sgd, other_memory]
METHODS = [
    (Momo, {"lr": 10.0}),
    (MomoAdam, {"lr": 10.0}),
    (MomoAdam, {"lr": 10.0, "weight_decay": 0.02}),
    (MomoAdam, {"lr": 10.0, "weight_decay": 0.02, "divide": False}),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls, options", METHODS)
def test_changes_from_outside_are_followed(cls, options, change):
    ours, right = step_sizes(cls, torch.float64, change, **options)
    np.testing.assert_allclose(ours, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls, options", METHODS[:2])
def test_changes_from_outside_are_followed_in_float32(cls, options, change):
    ours, right = step_sizes(cls, torch.float32, change, **options)
    np.testing.assert_allclose(ours, right, rtol=1e-3, atol=1e-3 * np.median(right))


SHORT = [
    (Momo, {"lr": 10.0}),
    (MomoAdam, {"lr": 10.0}),
    (MomoAdam, {"lr": 1.0, "weight_decay": 1e-4}),
    (MomoAdam, {"lr": 1.0, "weight_decay": 1e-4, "divide": False}),
]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls, options", SHORT)
def test_what_rounds_away_is_not_booked(cls, options, dtype, compile, monkeypatch):
    """A loss that is small beside its gradient makes steps of which most rounds away in bfloat16."""
    compile_from(monkeypatch, 8)
    short = {"steps": 60, "scale": 0.03, "compile": compile}
    ours, right = step_sizes(cls, dtype, lambda step, params: None, **short, **options)
    assert np.median(right) > 0 and np.abs(ours - right).max() <= 0.01 * np.median(right)


def test_an_average_of_weights_comes_and_goes(monkeypatch):
    """EMAModel writes through `.data`, unseen, and writes back what was there."""

    def evaluate(step, params):
        ema.step(params)
        if step % 5 == 4:
            ema.store(params)
            ema.copy_to(params)
            ema.restore(params)

    ema = EMAModel(problem()[0])
    ours, right = step_sizes(MomoAdam, torch.float64, evaluate, lr=10.0)
    np.testing.assert_allclose(ours, right, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_not_read_where_nothing_happened(dtype, monkeypatch):
    def overlap(bucket):
        raise AssertionError("the parameters are read")

    monkeypatch.setattr("momo_hf.optim.steps.movement.overlap", overlap)
    step_sizes(MomoAdam, dtype, lambda step, params: None, lr=1e-2)
    with pytest.raises(AssertionError, match="are read"):
        step_sizes(MomoAdam, dtype, clamp, lr=1e-2)


def test_a_change_before_a_skipped_step_is_not_forgotten():
    params, backward = problem()
    optimizer = MomoAdam(params, lr=10.0)
    reference = reference_for(optimizer, MomoAdam, params)
    for step in range(10):
        loss = backward(step)
        if step == 4:
            optimizer.step(loss=float("nan"))
        for i, p in enumerate(params):
            reference.params[0][i] = p.detach().numpy().copy()
        reference.step(float(loss), [[p.grad.numpy() for p in params]])
        optimizer.step(loss=loss)
        assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(reference.tau * reference.rho, 1e-6)
        if step == 3:
            with torch.no_grad():
                clamp(step, params)
    assert optimizer.param_groups[0]["skipped"] == 1


def test_a_checkpoint_of_projected_parameters_continues_alike():
    def run(save_at=None):
        params, backward = problem()
        optimizer, log = MomoAdam(params, lr=10.0), []
        for step in range(12):
            if step == save_at:
                params2, backward = problem()
                with torch.no_grad():
                    for p, q in zip(params2, params):
                        p.copy_(q)
                state, optimizer, params = optimizer.state_dict(), MomoAdam(params2, lr=10.0), params2
                optimizer.load_state_dict(state)
            optimizer.step(loss=backward(step))
            log.append(float(optimizer.param_groups[0]["effective_lr"]))
            if step < 5:
                with torch.no_grad():
                    clamp(step, params)
        return log

    assert run() == run(save_at=7)
