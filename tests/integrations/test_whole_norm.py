"""A clip that saw all gradients says whether they are finite; then nobody has to look at them again."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from momo_hf import Momo, MomoAdam


@pytest.fixture
def looked(monkeypatch):
    """How often a step has looked whether gradients are finite."""
    counts = []
    original = torch._foreach_norm

    def count(tensors, *args, **kwargs):
        counts.append(len(tensors))
        return original(tensors, *args, **kwargs)

    yield lambda: (counts.clear(), monkeypatch.setattr(torch, "_foreach_norm", count), counts)[-1]


def prepared(cls):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model, optimizer = accelerator.prepare(model, cls(model.parameters(), lr=0.1))

    def backward():
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(8, 4)).square().mean())

    backward()
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return accelerator, model, optimizer, backward


def written(model, optimizer):
    """Parameters and their state, copied."""
    inner = optimizer.optimizer
    return [t.detach().clone() for p in model.parameters() for t in (p, *inner.state[p].values())]


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
def test_a_whole_clip_is_enough(cls, looked):
    accelerator, model, optimizer, backward = prepared(cls)
    backward()
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    counts = looked()
    optimizer.step()
    assert counts == []
    backward()
    optimizer.step()
    assert counts == [4]


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize(
    "where", ["in the clipped ones", "after the clip", "in those not clipped", "new", "before a backward"]
)
def test_what_the_clip_did_not_see_is_looked_at(cls, where):
    accelerator, model, optimizer, backward = prepared(cls)
    before = written(model, optimizer)
    backward()
    first, last = list(model.parameters())[::3]
    clipped = list(model.parameters())
    if where == "in the clipped ones":
        first.grad[0, 0] = torch.nan
    elif where == "in those not clipped":
        clipped, last.grad[0] = clipped[:3], torch.nan
    elif where == "new":
        last.grad = None
    accelerator.clip_grad_norm_(clipped, 0.5)
    if where == "after the clip":
        first.grad[0, 0] = torch.nan
    elif where == "new":
        last.grad = torch.full_like(last, torch.nan)
    elif where == "before a backward":
        accelerator.backward(model(torch.full((8, 4), torch.nan)).square().mean() * 0 + 1)
    optimizer.step()
    torch.testing.assert_close(written(model, optimizer), before, rtol=0, atol=0)
    assert optimizer.param_groups[0]["skipped"] == 1
