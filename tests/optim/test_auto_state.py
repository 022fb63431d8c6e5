"""`lr="auto"` and states: a resume has the rates of the run that it goes on with, whatever it was built with."""

import copy
import io
import logging

import pytest
import torch
from torch.optim import lr_scheduler

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares, train


def schedule(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda k: 0.99**k)


def steps(optimizer, scheduler, backward, number):
    for _ in range(number):
        optimizer.step(loss=backward())
        if scheduler is not None:
            scheduler.step()


@both
@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("at", [5, "last", "first", 75])
@pytest.mark.parametrize("with_schedule", ["loaded", "new", "none"])
def test_a_resume_goes_on_with_the_same_rates(cls, averaging, at, with_schedule):
    """In the search, after its last step, after the first one of training, later; the schedule is loaded, forgotten, or none."""
    params, backward = least_squares()
    optimizer = cls(params, lr="auto", averaging=averaging)
    scheduler = None if with_schedule == "none" else schedule(optimizer)
    length = {True: 41, False: 60}[cls is not MomoAdam]
    steps(optimizer, scheduler, backward, {"last": length, "first": length + 1}.get(at, at))
    optimizer.eval()
    saved = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler and scheduler.state_dict(), [p.detach() for p in params]), saved)
    optimizer.train()
    saved.seek(0)
    state, schedule_state, weights = torch.load(saved, weights_only=True)
    others, again = least_squares()
    resumed = cls(others, lr="auto", averaging=averaging)
    new = None if with_schedule == "none" else schedule(resumed)
    with torch.no_grad():
        for p, value in zip(others, weights):
            p.copy_(value)
    resumed.load_state_dict(state)
    resumed.train()
    if with_schedule == "loaded":
        new.load_state_dict(schedule_state)
    elif new is not None:
        new.last_epoch = scheduler.last_epoch
    left = 70 if at == 5 else 20  # until a search is over, too
    steps(optimizer, scheduler, backward, left)
    steps(resumed, new, again, left)
    assert resumed.search.cap == optimizer.search.cap is not None
    assert resumed.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert float(resumed.cap()) == pytest.approx(float(optimizer.cap()), rel=1e-6)
    torch.testing.assert_close(others, params, rtol=1e-4, atol=1e-6)


def test_the_largest_rate_of_a_search_survives_a_reload():
    """Training that begins in the decay of a schedule has the whole cap, and keeps it."""
    caps = []
    for reload in (False, True):
        params, backward_low = least_squares()
        backward = lambda: backward_low() + 10  # noqa: B023, E731  # a loss that stays above a tenth of what it was
        optimizer = MomoAdam(params, lr="auto", averaging=True)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
        steps(optimizer, scheduler, backward, 58)
        for _ in range(3 * reload):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            steps(optimizer, scheduler, backward, 1)
        steps(optimizer, scheduler, backward, 130 - 58 - 3 * reload)
        caps.append(float(optimizer.cap()))
        assert optimizer.param_groups[0]["lr"] < 0.03 * optimizer.search.cap
        assert caps[-1] == pytest.approx(optimizer.search.cap, rel=1e-6)


def test_a_state_from_when_lr_was_a_share_of_the_cap_is_read_as_one():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    steps(optimizer, schedule(optimizer), backward, 70)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["lr_stand_in"]
        group["lr"], group["initial_lr"] = 0.99**70, 1.0
    old = schedule(optimizer).state_dict() | {"base_lrs": [1.0], "last_epoch": 70}
    params, again = least_squares()
    resumed = MomoAdam(params, lr="auto")
    scheduler = schedule(resumed)
    resumed.load_state_dict(state)
    scheduler.load_state_dict(old)
    train(resumed, again, 1)
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.99**70 * resumed.search.cap)
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.99**71 * resumed.search.cap)


@pytest.mark.parametrize(
    "saved, built, says",
    [
        ("auto", "auto", None),
        (0.1, 0.1, None),
        (0.1, 0.2, "is 0.2, and the loaded state brings 0.1:"),
        (0.1, "auto", "is auto, and the loaded state brings 0.1:"),
        ("auto", 0.1, "is 0.1, and the loaded state brings 0.157, found by a search:"),
    ],
)
@pytest.mark.parametrize("with_schedule", [True, False])
def test_another_rate_in_a_loaded_state_counts_and_is_named(saved, built, says, with_schedule, caplog):
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=saved)
    steps(optimizer, schedule(optimizer) if with_schedule else None, backward, 65)
    resumed = MomoAdam(least_squares()[0], lr=built)
    if with_schedule:
        schedule(resumed)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lines = [r.message for r in caplog.records]  # of the first time; then it is known
    assert len(lines) == (says is not None) and all(says in line for line in lines)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_later_group_has_the_cap_or_a_rate_of_its_own():
    params, backward = least_squares()
    optimizer = MomoAdam(params[:1], lr="auto")
    train(optimizer, backward, 62)
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] == optimizer.search.cap
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1e-4})
    train(optimizer, backward, 2)
    assert optimizer.param_groups[2]["lr"] == 1e-4


def test_what_is_said_changes_the_rate(caplog):
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=0.1, averaging=True, lb=-100.0)
    steps(optimizer, schedule(optimizer), backward, 5)
    resumed = MomoAdam(params, lr=0.01, averaging=True, lb=-100.0)
    scheduler = schedule(resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(word in caplog.text for word in ('set group["lr"]', "base_lrs", 'group["lr_max"]'))
    resumed.param_groups[0].update(lr=0.01, lr_max=0.01)
    scheduler.base_lrs = [0.01]
    steps(resumed, scheduler, backward, 3)
    assert float(resumed.cap()) == pytest.approx(0.01)


def test_a_copy_of_a_group_in_search_is_no_search():
    params, backward = least_squares()
    group = MomoAdam(params, lr="auto").param_groups[0]
    optimizer = MomoAdam([{**group, "lr": 0.1}])
    train(optimizer, backward, 2)
    assert optimizer.search is None and optimizer.param_groups[0]["lr"] == 0.1


def test_an_emptied_state_searches_anew_and_the_schedule_goes_with_it():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    scheduler = schedule(optimizer)
    steps(optimizer, scheduler, backward, 70)
    optimizer.state.clear()
    steps(optimizer, scheduler, backward, 1)
    assert optimizer.searching and optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.99**71)
    while optimizer.searching:
        steps(optimizer, scheduler, backward, 1)
    steps(optimizer, scheduler, backward, 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.search.cap * 0.99**scheduler.last_epoch)
