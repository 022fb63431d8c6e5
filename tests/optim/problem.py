"""A small least-squares problem for tests of the optimizers."""

import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam


METHODS = [Momo, MomoAdam]
both = pytest.mark.parametrize("cls", METHODS)


def least_squares(dtype=torch.float32, seed=0):
    """Parameters and a function that does forward and backward and returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator)
    target = inputs @ torch.randn(6, 2, generator=generator)
    weight = nn.Parameter(torch.randn(6, 2, generator=generator).to(dtype))
    bias = nn.Parameter(torch.zeros(2, dtype=dtype))

    def backward():
        for p in (weight, bias):
            p.grad = None
        loss = (inputs.to(dtype) @ weight + bias - target.to(dtype)).square().mean()
        loss.backward()
        return loss

    return [weight, bias], backward


def train(optimizer, backward, steps):
    return [float(optimizer.step(loss=backward().detach())) for _ in range(steps)]


def compile_from(monkeypatch, size):
    """Let tensors be worth a compiled call from this number of elements on."""
    monkeypatch.setattr("momo_hf.optim.tensors.chunks.PACKED", size)
    monkeypatch.setattr("momo_hf.optim.kernels.compiled.WORTH", size)


def as_on_a_device(monkeypatch):
    """Let the sets take part that other devices have, and keep numbers in tensors."""
    monkeypatch.setattr("momo_hf.optim.steps.arithmetic.on_host", lambda like: False)
    take = classmethod(lambda cls, bucket, known: (bucket.empty, bucket))
    for name in ("Fused", "FusedAdam"):
        monkeypatch.setattr(f"momo_hf.optim.kernels.fused.{name}.take", take)
