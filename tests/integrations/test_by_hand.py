"""Closures, losses and clip factors by hand, and several clips in one step. One process."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.integrations.loops import plain_steps, problem
from tests.toys import Net


# ---- Closures, losses and factors by hand ----


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_closure_on_a_prepared_optimizer_takes_the_steps_of_the_loop(clip, parts):
    accelerator, model, optimizer, loss_of = problem()

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for part in range(parts):
            loss = loss_of(model, slice(part * 24 // parts, (part + 1) * 24 // parts)) / parts
            accelerator.backward(loss)
            total += loss.detach()
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        return total

    taus = []
    for _ in range(3):
        optimizer.step(closure)
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    assert taus == pytest.approx(plain_steps(loss_of, clip=clip), rel=1e-10)


def test_what_was_backpropagated_counts_and_not_what_the_closure_returns():
    accelerator, model, optimizer, loss_of = problem()

    def closure():
        optimizer.zero_grad()
        accelerator.backward(loss_of(model))
        return 100.0

    optimizer.step(closure)
    assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(
        plain_steps(loss_of, steps=1)[0], rel=1e-12
    )


def test_a_closure_that_calls_backward_itself_gives_its_loss():
    _, model, optimizer, loss_of = problem()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    taus = []
    for _ in range(3):
        optimizer.step(closure)
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    assert taus == pytest.approx(plain_steps(loss_of), rel=1e-12)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_loss_by_hand_wins_and_keeps_the_clip_factor(clip):
    """A gradient cache: what is backpropagated is <cached gradient, representation>, which is not the loss."""
    accelerator, model, optimizer, loss_of = problem()
    taus = []
    for _ in range(3):
        loss = loss_of(model)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        optimizer.set_loss(loss)
        assert optimizer.has_loss
        accelerator.backward(sum((p * g).sum() for p, g in zip(model.parameters(), grads)))
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    assert taus == pytest.approx(plain_steps(loss_of, clip=clip), rel=1e-10)


def test_a_clip_factor_by_hand_works_on_a_prepared_optimizer():
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    optimizer.set_clip_factor(0.1 / (nn.utils.clip_grad_norm_(model.parameters(), 0.1) + 1e-6))
    optimizer.step()
    assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(
        plain_steps(loss_of, clip=0.1, steps=1)[0]
    )


def test_a_prepared_optimizer_takes_the_loss_with_the_step():
    accelerator, model, optimizer, loss_of = problem()
    loss = loss_of(model)
    accelerator.backward(loss + 100.0)
    optimizer.step(loss=loss)
    assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(plain_steps(loss_of, steps=1)[0])
    with pytest.raises(TypeError, match="losses"):
        optimizer.step(losses=loss)


def test_other_prepared_optimizers_have_no_set_loss():
    accelerator, model = Accelerator(cpu=True), Net()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    assert not hasattr(optimizer, "set_loss")
    with pytest.raises(AttributeError, match="set_loss"):
        optimizer.set_loss(1.0)


# ---- Two clips in one step ----


def clipped(*clips):
    accelerator, model, optimizer, loss_of = problem()
    parts = {"all": model.parameters, "first": model.first.parameters, "none": lambda: iter(())}
    accelerator.backward(loss_of(model))
    for part, max_norm in clips:
        accelerator.clip_grad_norm_(parts[part](), max_norm)
    optimizer.step()
    return float(optimizer.param_groups[0]["effective_lr"])


def test_full_clips_multiply():
    # The factor after a clip to 0.2 and one to 0.05 differs from that of one clip by torch's 1e-6 in the denominator.
    assert clipped(("all", 0.2), ("all", 0.05)) == pytest.approx(clipped(("all", 0.05)), rel=1e-4)
    assert clipped(("all", 0.2), ("all", 10.0)) == pytest.approx(clipped(("all", 0.2)), rel=1e-12)


@pytest.mark.parametrize("max_norm", [float("inf"), None])
def test_no_limit_is_no_clip(max_norm):
    assert clipped(("all", max_norm)) == clipped()
    assert clipped(("all", 0.1), ("all", max_norm)) == clipped(("all", 0.1))


def test_an_empty_list_clips_nothing_and_says_that(caplog):
    with caplog.at_level(logging.WARNING):
        assert clipped(("none", 0.1)) == clipped()
    assert ["nothing was clipped" in r.message for r in caplog.records] == [True]


def test_partial_clips_take_the_smallest_factor(caplog):
    with caplog.at_level(logging.WARNING):
        found = clipped(("first", 0.1), ("first", 0.05))
    assert sum("a part of the parameters" in r.message for r in caplog.records) == 1
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    norms = [float(nn.utils.clip_grad_norm_(model.first.parameters(), limit)) for limit in (0.1, 0.05)]
    factors = [limit / (norm + 1e-6) for limit, norm in zip((0.1, 0.05), norms)]
    optimizer.set_clip_factor(min(factors))
    optimizer.step()
    assert found == pytest.approx(float(optimizer.param_groups[0]["effective_lr"]), rel=1e-12)
