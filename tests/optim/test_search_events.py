"""What a search and the averaging after it must not take in, and what they must not forget."""

import copy

import pytest
import torch

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares, train


def test_an_lr_that_falls_when_the_search_is_over_is_not_followed():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto", averaging=True)
    while optimizer.search.cap is None:
        train(optimizer, backward, 1)
    optimizer.eval()
    optimizer.train()
    optimizer.param_groups[0]["lr"] *= 0.1
    train(optimizer, backward, optimizer.search.steps)
    assert float(optimizer.cap()) == pytest.approx(optimizer.search.cap)


def test_a_warmup_that_was_reached_before_a_reload_counts_after_it():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto", averaging=True)
    train(optimizer, lambda: backward() + 10, 130)  # a loss that stays above a tenth of what it was
    optimizer.param_groups[0]["lr"] *= 0.1  # a schedule that falls
    cap = float(optimizer.cap())
    state = copy.deepcopy(optimizer.state_dict())
    resumed = MomoAdam(params, lr="auto", averaging=True)
    resumed.load_state_dict(state)
    assert float(resumed.cap()) == float(copy.deepcopy(optimizer).cap()) == cap == pytest.approx(optimizer.search.cap)


@both
def test_a_clip_factor_above_1_is_no_clipping(cls):
    searches = []
    for factor in (None, 3.0):
        params, backward = least_squares()
        optimizer = cls(params, lr="auto")
        for _ in range(61):
            loss = backward()
            if factor:
                optimizer.set_clip_factor(factor)
            optimizer.step(loss=loss)
        searches.append(optimizer.search)
    assert searches[0] == searches[1] and searches[0].cap is not None


@both
def test_a_state_from_the_middle_counts_and_not_the_end_that_was_under_way(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr="auto")
    train(optimizer, backward, 5)
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    while optimizer.search.cap is None:
        train(optimizer, backward, 1)
    whole = optimizer.search
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(params, weights):
            p.copy_(value)
    assert optimizer.searching and optimizer.search.steps == 5
    train(optimizer, backward, whole.steps - 5)
    assert optimizer.search == whole


@both
@pytest.mark.parametrize("asked", [False, True])
def test_a_dropped_loss_is_a_step_of_it_unless_another_keeps_the_losses(cls, asked):
    params, backward = least_squares()
    optimizer = cls(params, lr="auto")
    train(optimizer, backward, 5)
    if asked:
        optimizer.loss_source = lambda *given: given[:2] + (False,)
    optimizer.set_loss(1.0)
    optimizer.drop_loss()
    assert optimizer.param_groups[0]["skipped"] == (0 if asked else 1) and optimizer.search.steps == 5
