"""Stalls and skipped steps are said in every loop, once, and only what is new."""

import logging

import pytest
import torch

from momo_hf.optim import watch
from tests.optim.problem import both, least_squares, train


def messages(caplog, word):
    return [record.message for record in caplog.records if word in record.message]


@both
def test_a_bare_loop_hears_of_a_stall_once(cls, caplog):
    params, backward = least_squares()
    train(cls(params, lr=0.1, lb=1e6), backward, 200)
    assert len(messages(caplog, "training stalls")) == 1
    assert "50 of the last 50 steps" in messages(caplog, "training stalls")[0]


@both
def test_most_steps_are_enough_for_a_stall(cls, caplog):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, lb=0.0, **({"beta": 0.0} if cls.__name__ == "Momo" else {"betas": (0.0, 0.9)}))
    for step in range(100):
        backward()
        optimizer.step(loss=1.0 if step % 3 == 0 else -1.0)
    assert messages(caplog, "33 of the last 50 steps")
    assert optimizer.param_groups[0]["stalled"] == 66


@both
def test_few_steps_are_no_stall(cls, caplog):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, **({"beta": 0.0} if cls.__name__ == "Momo" else {"betas": (0.0, 0.9)}))
    for step in range(100):
        backward()
        optimizer.step(loss=-1.0 if step % 3 == 0 else 1.0)
    assert not caplog.records and optimizer.param_groups[0]["stalled"] == 34


@both
def test_every_look_says_what_is_new(cls, caplog):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    for step in range(200):
        loss = backward().detach()
        optimizer.step(loss=loss * float("nan") if step in (3, 4, 120) else loss)
    assert [
        "skipped 2 of the last 50" in m or "skipped 1 of the last 50" in m for m in messages(caplog, "skipped")
    ] == [True, True]
    assert "(3 in all)" in messages(caplog, "skipped")[1]


@both
def test_after_a_resume_no_old_count_is_news(cls, caplog):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    for step in range(40):
        loss = backward().detach()
        optimizer.step(loss=float("nan") if step < 30 else loss)
    params, backward = least_squares(seed=1)
    resumed = cls(params, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, backward, 60)
    assert not caplog.records
    assert resumed.param_groups[0]["skipped"] == 30


def test_other_ranks_keep_quiet(monkeypatch, caplog):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, count in ((1, 0), (0, 1)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        group = {name: torch.tensor(0.0) for name in ("stalled", "skipped", "fstar")}
        look = watch.Watch(group)
        group["skipped"] = torch.tensor(5.0)
        with caplog.at_level(logging.WARNING):
            for _ in range(watch.EVERY):
                look.after_step(group)
        assert len(caplog.records) == count


@pytest.mark.parametrize("arrived", [True, False])
def test_a_device_is_never_waited_for(arrived, monkeypatch, caplog):
    """A simulated accelerator: the copy is read at a later look, and only when it has arrived."""

    class Event:
        def __init__(self, device):
            assert device == "meta"

        def record(self):
            pass

        def query(self):
            return arrived

    class OnDevice:
        device = torch.device("meta")

        def to(self, device, non_blocking):
            assert device == "cpu" and non_blocking
            return torch.tensor([0.0, 5.0, 0.0])

    monkeypatch.setattr(torch, "Event", Event)
    look = watch.Watch()
    monkeypatch.setattr(watch, "counters_of", lambda group: OnDevice())
    for _ in range(watch.EVERY):
        look.after_step({})
    assert not caplog.records
    for _ in range(2 * watch.EVERY):
        look.after_step({})
    assert len(caplog.records) == arrived


@both
def test_a_graph_that_is_being_captured_holds_no_look(cls, caplog, monkeypatch):
    monkeypatch.setattr(watch, "_captures", lambda: True)
    params, backward = least_squares()
    train(cls(params, lr=0.1, lb=1e6), backward, 60)
    assert not caplog.records
    monkeypatch.undo()
    train(cls(params, lr=0.1, lb=1e6), backward, 60)
    assert messages(caplog, "training stalls")


@both
def test_an_optimizer_whose_state_was_emptied_is_watched_anew(cls, caplog):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    for _ in range(2):
        for step in range(50):
            backward()
            optimizer.step(loss=float("nan") if step < 30 else 1.0)
        optimizer.state.clear()
    assert len(messages(caplog, "(30 in all)")) == 2
