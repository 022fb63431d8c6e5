"""Groups that a schedule brings to one `lr` keep the rates in force, and each its own step and decay."""

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam


def two():
    return [nn.Parameter(torch.full((5,), 1.0 + i, dtype=torch.float64)) for i in range(2)]


def run(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step(loss=sum(p.detach().square().sum() for p in params) + 10)


def z_of(optimizer, p):
    return p.detach() + optimizer.state[p]["ahead"]


def check_next_step(optimizer, params, ratios, decay):
    """One step of z by its formula, with the rates that the groups should have, as shares of the first."""
    before = [z_of(optimizer, p) for p in params]
    run(optimizer, params, 1, seed=1)
    tau, cap = float(optimizer.param_groups[0]["effective_lr"]), float(optimizer.cap())
    for p, z, ratio in zip(params, before, ratios):
        entry = optimizer.state[p]
        k = optimizer.param_groups[0]["step"] - entry.get("start", 0)
        direction = p.grad / ((entry["exp_avg_sq"] / (1 - 0.999**k)).sqrt() + 1e-8)
        expected = (z - tau * ratio * direction) / (1 + cap * ratio * decay)
        torch.testing.assert_close(z_of(optimizer, p), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("end", [0.0, 1e-6])
def test_a_schedule_that_ends_at_one_number(decay, end):
    params = two()
    optimizer = MomoAdam([{"params": [p]} for p in params], lr="auto", averaging=True, weight_decay=decay)
    optimizer.param_groups[1]["lr"] *= 0.01
    run(optimizer, params, 90)
    for group in optimizer.param_groups:
        group["lr"] = end
    run(optimizer, params, 2)
    check_next_step(optimizer, params, (1.0, 0.01), decay)


def test_a_group_that_is_added_at_the_number_where_another_has_come():
    params = two()
    optimizer = MomoAdam(params[:1], lr="auto", averaging=True, weight_decay=0.1)
    run(optimizer, params[:1], 90)
    optimizer.add_param_group({"params": params[1:], "lr": "auto"})
    low = 0.1 * optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = low
    run(optimizer, params, 10)
    check_next_step(optimizer, params, (1.0, 0.1), 0.1)
