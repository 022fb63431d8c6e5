"""Parameters that change their dtype in place, as by `model.float()`: as a new optimizer that loads the state."""

import copy

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares, train


CHANGES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]


def convert(params, dtype):
    for p in params:
        p.data = p.data.to(dtype)


@both
@pytest.mark.parametrize("old, new", CHANGES, ids=str)
@pytest.mark.parametrize(
    "options, steps, mode",
    [
        ({"lr": 0.01}, 5, "train"),
        ({"lr": 0.01, "averaging": True}, 5, "train"),
        ({"lr": 0.01, "averaging": True}, 5, "eval"),
        ({"lr": "auto", "averaging": True}, 30, "eval"),
        ({"lr": "auto"}, 70, "train"),
    ],
    ids=str,
)
def test_as_a_new_optimizer_that_loads_the_state(cls, old, new, options, steps, mode):
    params, backward = least_squares(old)
    optimizer = cls(params, **options)
    train(optimizer, backward, steps)
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    _, backward = least_squares(new)
    convert(params, new)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = cls(others, **options)
    loaded.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for o in (optimizer, loaded):
            o.train()
        for p, q in zip(params, others):
            p.grad = (p.detach() + 0.1 * torch.randn(p.shape, generator=generator)).to(new)
            q.grad = p.grad.clone()
        for o in (optimizer, loaded):
            o.step(loss=1.0)
            o.eval()
        tolerance = max(torch.finfo(new).eps, torch.finfo(old).eps) if old.itemsize > new.itemsize else 1e-5
        torch.testing.assert_close(params, others, rtol=4 * tolerance, atol=4 * tolerance)
    for p, q in zip(params, others):
        entry, twin = optimizer.state[p], loaded.state[q]
        assert {k: v.dtype for k, v in entry.items()} == {k: v.dtype for k, v in twin.items()}
    assert optimizer.param_groups[0]["step"].dtype == loaded.param_groups[0]["step"].dtype


def search_on(optimizer, p, numbers):
    """Steps of a search, or the first one of training after it; noise around a minimum at 4."""
    for k in numbers:
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        p.grad = (p.detach().float() - 4 + noise).to(p.dtype)
        optimizer.step(loss=1.0)
        if optimizer.search.cap is not None:
            break


@pytest.mark.parametrize("old, new", CHANGES[:3] + [(torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_search_goes_back_to_weights_that_were_loaded_after_a_dropped_step(old, new):
    """And where its state was loaded from the middle of the ramp, by parameters of another dtype."""
    p = nn.Parameter(torch.zeros(20, dtype=old))
    optimizer = MomoAdam([p], lr="auto", averaging=True)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=float("nan"))
    with torch.no_grad():
        p.fill_(3.0)
    search_on(optimizer, p, range(50))
    assert (p - 3).abs().max() > 0.1
    q = nn.Parameter(p.detach().to(new))
    resumed = MomoAdam([q], lr="auto", averaging=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    search_on(resumed, q, range(50, 99))
    assert resumed.search.steps <= 60 and (q == 3).all()
    search_on(resumed, q, [100])
    resumed.eval()
    assert (q.float() - 3).abs().max() < 0.05
