"""The memory of the sets on torch's fused kernels: what is kept for the second pass, and what does not stay in it."""

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam
from tests.optim.problem import leave_out_fused


OPTIONS = [{}, {"averaging": True}, {"lr": "auto"}, {"weight_decay": 0.1}, {"averaging": True, "weight_decay": 0.1}]


def steps(options, gradients, size=40):
    """The parameters and their state after steps along some gradients, one group of parameters after the other."""
    params = [nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(3)]
    optimizer = MomoAdam([{"params": params[:1]}, {"params": params[1:], "eps": 1e-7}], **{"lr": 0.1, **options})
    for number, gradient in enumerate(gradients):
        for p in params:
            p.grad = gradient.clone()
        optimizer.step(loss=5.0 - number / 10)
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kept", [0, 50, 100])
def test_directions_that_are_not_kept_are_made_again(options, kept, monkeypatch):
    gradients = [torch.sin(torch.arange(40.0) + k) for k in range(6)]
    monkeypatch.setattr("momo_hf.optim.kernels.fused.ALONE", 1)
    monkeypatch.setattr("momo_hf.optim.kernels.memory.KEPT", kept)
    found = steps(options, gradients)
    leave_out_fused(monkeypatch)
    for ours, plain in zip(found, steps(options, gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_direction_that_is_no_number_does_not_stay(options, monkeypatch):
    """0 / 0 with an eps of 0: that step is dropped, and the next one is none the worse for it."""
    gradients = [torch.arange(40.0), torch.ones(40), torch.ones(40)]
    found = steps({**options, "eps": 0.0}, gradients)
    assert all(value.isfinite().all() for value in found)
    leave_out_fused(monkeypatch)
    for ours, plain in zip(found, steps({**options, "eps": 0.0}, gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
