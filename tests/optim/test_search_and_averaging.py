"""The search for the cap and averaging in one optimizer: it searches first, and averages from where that began."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.averaging_reference import AveragingReference
from tests.optim.problem import both
from tests.optim.ramp_reference import fall
from tests.optim.test_search import problem, search


def steps(optimizer, params, backward, numbers):
    for j in numbers:
        loss, _ = backward(j % 60)
        optimizer.step(loss=loss)
    return [p.detach().clone() for p in params]


@both
def test_the_ramp_is_the_one_without_averaging(cls):
    x, _, params, backward = problem()
    _, _, others, backward_others = problem()
    averaging, plain = cls(params, lr="auto", averaging=True), cls(others, lr="auto")
    search(averaging, backward)
    search(plain, backward_others)
    assert averaging.search == plain.search
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), torch.tensor(x))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_after_it_averaging_begins_as_with_the_cap_as_lr_and_a_warmup(cls, dtype):
    _, _, params, backward_low = problem(dtype=dtype)

    def backward(j, clip=None):
        """So far above its bound that the cap does not fall with it."""
        loss, kappa = backward_low(j, clip)
        return loss + 10, kappa

    optimizer = cls(params, lr="auto", weight_decay=0.1, averaging=True)
    # A warmup is followed, a decay is not. What counts is the largest, also of the search.
    factor = lambda j: min(1.0, j / 20) if j < 70 else 0.1  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda j: factor(j + 1))
    number = search(optimizer, backward)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = cls(others, lr=0.0, weight_decay=0.1, averaging=True)
    for j in range(1, 101):
        loss, _ = backward(j % 60)
        for p, q in zip(params, others):
            q.grad = p.grad.clone()
        fresh.param_groups[0]["lr"] = optimizer.search.cap * min(1.0, j / number) * min(1.0, j / 20)
        optimizer.step(loss=loss)
        scheduler.step()
        fresh.step(loss=loss)
        if j % 30 == 0:  # the modes, in which the averages are, and back
            for o in (optimizer, fresh):
                o.eval()
            torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-9)
            for o in (optimizer, fresh):
                o.train()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-9)
    for p, q in zip(params, others):
        assert set(optimizer.state[p]) == set(fresh.state[q])


@both
def test_the_cap_falls_with_the_last_tenth_of_the_loss(cls):
    _, _, params, backward = problem(noise=0.0)
    optimizer = cls(params, lr="auto", averaging=True)
    number, adam = search(optimizer, backward), cls is MomoAdam
    start = [p.detach().numpy().copy() for p in params]
    right, losses, factors = (
        AveragingReference(start, [0, 0], [0.0], [0.0], beta2=0.999 if adam else None, polyak=2.0),
        [],
        [],
    )
    for j in range(1, 101):
        loss, _ = backward(j % 60)
        factors.append(fall(optimizer.search.losses, losses, corrected=adam))
        losses.append(float(loss))
        right.lrs = [optimizer.search.cap * min(1.0, j / number) * factors[-1]]
        right.step(losses[-1], [p.grad.numpy() for p in params])
        optimizer.step(loss=loss)
        assert float(optimizer.cap()) == pytest.approx(right.lrs[0], rel=1e-9)
        for p, y in zip(params, right.y):
            np.testing.assert_allclose(p.detach().numpy(), y, rtol=1e-8, atol=1e-10)
    assert factors[0] == 1 and min(factors) < 0.7


@both
def test_after_a_search_polyaks_step_counts_twice(cls):
    _, _, params, backward = problem()
    optimizer = cls(params, lr="auto", averaging=True)
    number, adam = search(optimizer, backward), cls is MomoAdam
    optimizer.param_groups[0]["lr"] *= 30  # so that Polyak's step is the shorter one
    start, losses, shorter = [p.detach().numpy().copy() for p in params], [], []
    right = AveragingReference(start, [0, 0], [0.0], [0.0], beta2=0.999 if adam else None, polyak=2.0)
    for j in range(1, 101):
        loss, _ = backward(j % 60)
        factor = fall(optimizer.search.losses, losses, corrected=adam)
        losses.append(float(loss))
        right.lrs = [30 * optimizer.search.cap * min(1.0, j / number) * factor]
        right.step(losses[-1], [p.grad.numpy() for p in params])
        optimizer.step(loss=loss)
        shorter.append(right.taus[-1] < right.lrs[0])
        for p, y in zip(params, right.y):
            np.testing.assert_allclose(p.detach().numpy(), y, rtol=1e-8, atol=1e-10)
    assert sum(shorter) > 20


@both
def test_a_loss_below_its_bound_does_not_end_the_steps(cls):
    """A bound that is none says nothing of how near a minimum is; and nothing that is not known stops the first step."""
    _, _, params, backward = problem()
    optimizer = cls(params, lr="auto", averaging=True)
    number = search(optimizer, backward)
    for j in range(1, number + 1):
        loss, _ = backward(j % 60)
        optimizer.step(loss=loss - 50)
        assert float(optimizer.cap()) == pytest.approx(optimizer.search.cap * j / number)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("at", [5, "last", "after"])
def test_a_resume_in_any_phase_and_mode_goes_on_bit_for_bit(cls, dtype, mode, at):
    _, _, params, backward = problem(dtype=dtype)
    number = search(cls(params, lr="auto", averaging=True), backward)  # which takes itself back
    optimizer = cls(params, lr="auto", averaging=True)
    at = {"last": number, "after": number + 7}.get(at, at)
    steps(optimizer, params, backward, range(1, at + 1))
    getattr(optimizer, mode)()
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    optimizer.train()
    wanted = steps(optimizer, params, backward, range(at + 1, at + 80))

    _, _, params, backward = problem(dtype=dtype)
    resumed = cls(params, lr="auto", averaging=True)
    with torch.no_grad():
        for p, value in zip(params, saved[1]):
            p.copy_(value)
    resumed.load_state_dict(saved[0])
    resumed.train()
    assert all(map(torch.equal, steps(resumed, params, backward, range(at + 1, at + 80)), wanted))
    assert resumed.search == optimizer.search and resumed.search.cap is not None


@both
def test_eval_during_the_search_leaves_the_weights_and_a_step_then_is_an_error(cls):
    _, _, params, backward = problem()
    optimizer = cls(params, lr="auto", averaging=True)
    before = steps(optimizer, params, backward, range(1, 6))
    optimizer.eval()
    assert all(map(torch.equal, params, before))
    with pytest.raises(RuntimeError, match="eval mode"):
        steps(optimizer, params, backward, [6])
    optimizer.train()
    assert all(map(torch.equal, params, before))


@both
def test_eval_right_after_the_last_step_of_the_search_shows_the_weights_from_before(cls):
    x, _, params, backward = problem()
    optimizer = cls(params, lr="auto", averaging=True)
    search(optimizer, backward)
    optimizer.eval()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), torch.tensor(x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
def test_the_state_has_the_same_entries_in_every_phase(cls):
    _, _, params, backward = problem(dtype=torch.bfloat16)
    optimizer = cls(params, lr="auto", averaging=True)
    seen = []
    for j in range(1, 70):
        steps(optimizer, params, backward, [j])
        entry = optimizer.state_dict()["state"][0]
        seen.append({name: (value.shape, value.dtype) for name, value in entry.items()})
    assert optimizer.search.cap is not None and all(entry == seen[0] for entry in seen)
