"""Methods whose direction is not linear in the momentum: it is taken of the corrected average, against explicit float64."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim.methods import MomoRows, MomoSign


def sign(d):
    return np.sign(d)


def rows(d):
    return d / np.linalg.norm(d, axis=-1, keepdims=True) if d.ndim > 1 else d / np.linalg.norm(d)


@pytest.mark.parametrize("cls, direction", [(MomoSign, sign), (MomoRows, rows)])
@pytest.mark.parametrize("weight_decay, divide", [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("lr", [1e-2, 10.0])
def test_steps_of_any_direction_are_those_of_the_formulas(cls, direction, weight_decay, divide, lr):
    """method.md, "Any direction": d̂, f̂, ĉ, τ = min(α, (f̂ + ĉ - f*)₊ / <d̂, u>); <g, x> is averaged as it is defined."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((4, 3)), rng.standard_normal(6)]
    params = [nn.Parameter(torch.tensor(value)) for value in x]
    optimizer = cls(params, lr=lr, weight_decay=weight_decay, divide=divide)
    d, f_bar, gamma = [np.zeros_like(value) for value in x], 0.0, 0.0
    for k in range(1, 30):
        loss = sum(np.sum((value - 1) ** 2) for value in x)
        grads = [2 * (value - 1) + 0.1 * rng.standard_normal(value.shape) for value in x]
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        optimizer.step(loss=torch.tensor(loss))

        rho, a = 1 - 0.9**k, lr * weight_decay
        d = [0.9 * old + 0.1 * g for old, g in zip(d, grads)]
        f_bar = 0.9 * f_bar + 0.1 * loss
        gamma = 0.9 * gamma + 0.1 * sum(np.sum(g * value) for g, value in zip(grads, x))
        hat = [value / rho for value in d]
        u = [direction(value) for value in hat]
        n = sum(np.sum(h * v) for h, v in zip(hat, u))
        overlap = sum(np.sum(h * value) for h, value in zip(hat, x))
        height = f_bar / rho + overlap - gamma / rho - overlap * a / (1 + a)
        tau = min(lr, max(height, 0.0) * (1 + a) / n)
        if divide:
            x = [(value - tau * v) / (1 + a) for value, v in zip(x, u)]
        else:
            x = [(1 - a) * value - tau * v for value, v in zip(x, u)]
        assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(tau, rel=1e-9)
        for p, value in zip(params, x):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-9, atol=1e-12)


def test_a_sign_method_at_its_cap_steps_by_lr_from_the_first_step_on():
    p = nn.Parameter(torch.zeros(3))
    optimizer = MomoSign([p], lr=0.01, lb=-1e9)
    for k in range(1, 4):
        p.grad = torch.tensor([3.0, -2.0, 0.5])
        optimizer.step(loss=1.0)
        torch.testing.assert_close(p.detach(), -0.01 * k * p.grad.sign())
        assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(0.01)


class Counted(type(MomoRows.methods["rows"])):
    """Counts the directions, and sees whole tensors alone."""

    def __init__(self):
        self.seen = []

    def direction(self, vector, buffers, options):
        self.seen.append(tuple(vector.shape))
        return super().direction(vector, buffers, options)


@pytest.mark.parametrize("averaging", [False, True])
def test_whole_tensors_come_in_stacks_of_one_shape_and_have_their_direction_once(averaging):
    class Counting(MomoRows):
        methods = {"rows": Counted()}

    shapes = [(4, 3), (4, 3), (6,), (2, 4, 3), (4, 3)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    transposed = nn.Parameter(torch.randn(3, 4).t())  # (4, 3), and not contiguous
    channels_last = nn.Parameter(torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last))
    everything = [*params, transposed, channels_last]
    optimizer = Counting(everything, averaging=averaging)
    for p in everything:
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    assert sorted(Counting.methods["rows"].seen) == sorted([(4, 4, 3), (1, 6), (1, 2, 4, 3), (1, 2, 3, 5, 4)])


def test_parts_of_parameters_are_refused_where_whole_ones_are_needed():
    params = [nn.Parameter(torch.randn(4, 3))]
    optimizer = MomoRows(params)
    optimizer.shard_group = object()  # as ZeRO sets it
    params[0].grad = torch.randn_like(params[0])
    with pytest.raises(RuntimeError, match=r"Rows needs whole parameters, and one of shape \(4, 3\) is split"):
        optimizer.step(loss=1.0)
