"""Groups that a schedule brings to one `lr` keep the rates in force, and each its own step and decay."""

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam


def run(optimizer, params, steps, schedule, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        for group, share in zip(optimizer.param_groups, schedule(step)):  # of what stands for the cap, or of the cap
            group["lr"] = share * (group["lr_stand_in"] or optimizer.search.cap)
        for p in params:
            p.grad = p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step(loss=sum(p.detach().square().sum() for p in params) + 10)


def z_of(optimizer, p):
    return p.detach() + optimizer.state[p]["ahead"]


def check_next_step(optimizer, params, schedule, rates, decay):
    """One step of z by its formula, with the rates that every group should have."""
    before = [z_of(optimizer, p) for p in params]
    run(optimizer, params, [200], schedule, seed=1)
    tau, found = float(optimizer.param_groups[0]["effective_lr"]), optimizer.search
    cap = found.cap * min(float(optimizer.param_groups[0]["step"]) / found.steps, 1)
    for p, z, rate in zip(params, before, rates):
        entry = optimizer.state[p]
        k = optimizer.param_groups[0]["step"] - entry.get("start", 0)
        direction = p.grad / ((entry["exp_avg_sq"] / (1 - 0.999**k)).sqrt() + 1e-8)
        expected = (z - tau * rate / rates[0] * direction) / (1 + cap * rate * decay)
        torch.testing.assert_close(z_of(optimizer, p), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("end", [0.0, 0.001])
def test_a_schedule_that_ends_at_one_number(decay, end):
    params = [nn.Parameter(torch.full((5,), 1.0 + i, dtype=torch.float64)) for i in range(2)]
    optimizer = MomoAdam([{"params": [p]} for p in params], lr="auto", averaging=True, weight_decay=decay)

    def schedule(step):
        return [max(share * (1 - step / 100), end) for share in (1.0, 0.01)]

    run(optimizer, params, range(110), schedule)
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == end * optimizer.search.cap
    check_next_step(optimizer, params, schedule, (1.0, 0.01), decay)


def test_a_group_that_is_added_at_the_number_where_another_has_come():
    params = [nn.Parameter(torch.full((5,), 1.0 + i, dtype=torch.float64)) for i in range(2)]
    optimizer = MomoAdam(params[:1], lr="auto", averaging=True, weight_decay=0.1)
    run(optimizer, params[:1], range(90), lambda step: [1.0 if step < 80 else 0.1])
    optimizer.add_param_group({"params": params[1:], "lr": "auto"})
    run(optimizer, params, range(10), lambda step: [0.1, 0.1])
    check_next_step(optimizer, params, lambda step: [0.1, 0.1], (1.0, 0.1), 0.1)
