"""The search for the cap: its rule and its steps beside an explicit float64 version, and what is left when it is over."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam, MomoOptimizer
from momo_hf.optim.adam import Adam
from momo_hf.optim.steps.search import REASONS, new_search, next_move
from momo_hf.optim.steps.verdict import Verdict
from tests.optim.problem import as_on_a_device, both, least_squares, train
from tests.optim.ramp_reference import fall, ramp, verdict
from tests.optim.test_cost import NoReads


def made_up(seed):
    """A ramp as one could be recorded: a share that falls to where steps overshoot, noise, harm; (f, slope, n, q) each."""
    rng = np.random.default_rng(seed)
    size = 1e-6 * 2.0 ** (np.arange(60) / 3)
    turn, hurt = 10 ** rng.uniform(-5.5, 1, 2)
    noise = rng.choice([0.02, 0.3, 1.0, 4.0])
    left = rng.uniform(0.2, 1) * np.clip(1 - size / turn, -3, 1) + noise * rng.standard_normal(60)
    norm = np.exp(rng.normal(0, 0.3, 60))
    sample = np.exp(rng.normal(0, 0.4, 60)) * np.where(size > hurt, (size / hurt) ** 2, 1)
    slope = np.concatenate([[0.0], left[1:] * norm[:-1]])
    return list(zip(rng.uniform(1, 2, 60), slope, norm, sample))


def follow(rows, **options):
    """The states of the package's rule over rows, until it ends."""
    state = new_search(torch.zeros((), dtype=torch.float64))
    for row in rows:
        numbers = torch.tensor(row, dtype=torch.float64).unbind()
        state, move = next_move(state, *numbers, lb=0.0, **{"start": 1e-6, **options})
        yield state, move
        if move.back:
            return


def test_the_rule_is_the_formula():
    seen = set()
    for seed in range(80):
        rows = made_up(seed)
        for k, (state, move) in enumerate(follow(rows), start=1):
            reason, cap = verdict(rows[:k], 1e-6)
            assert {value.dtype for value in state} == {torch.float64}
            assert REASONS[int(state.ended)] == reason and bool(move.back) == bool(reason), (seed, k)
            assert bool(move.accepted) != bool(move.back)
            np.testing.assert_allclose(move.size, 1e-6 * 2 ** ((k - 1) / 3), rtol=1e-12)
        np.testing.assert_allclose(state.cap, cap, rtol=1e-9)
        seen.add(reason)
    assert seen == {"overshoot", "harm", "the end of the ramp", "nothing found"}


@pytest.mark.parametrize("scatter", [0.3, 0.8, 1.2])
def test_samples_that_only_scatter_are_no_harm_and_a_jump_is(scatter):
    """As on the plateau where a small classifier begins: no signal in the slope, and samples over a decade or two."""
    ended = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        sample = np.exp(scatter * rng.standard_normal(60)) * np.where(np.arange(60) < 40, 1, 200)
        rows = list(zip(np.ones(60), rng.standard_normal(60), np.ones(60), sample))
        state = list(follow(rows))[-1][0]
        assert REASONS[int(state.ended)] == "harm"
        ended.append(int(state.steps))
    # The medians of five see the jump three steps later.
    assert sum(43 <= steps <= 46 for steps in ended) >= 24


def test_a_clip_factor_is_taken_out_of_the_samples_alone():
    rows = made_up(1)
    clipped = [(f, slope, norm, 0.1 * sample) for f, slope, norm, sample in rows]
    plain, scaled = (list(follow(r, clip_factor=c))[-1][0] for r, c in ((rows, None), (clipped, torch.tensor(0.1))))
    torch.testing.assert_close(tuple(scaled), tuple(plain), equal_nan=True)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_what_is_not_finite_is_dropped_and_ends_the_search_when_it_stays(where):
    rows = made_up(2)
    bad = list(rows[10])
    bad[where] = math.nan
    once = [state for state, _ in follow([*rows[:10], tuple(bad), *rows[10:]])]
    assert once[10].steps == once[9].steps == 10 and once[10].dropped > 0
    without = [state for state, _ in follow(rows)]
    torch.testing.assert_close(tuple(once[-1]), tuple(without[-1]), equal_nan=True)
    # A loss is given a second batch, a gradient as long as a loss scaler may need.
    patience = 2 if where == 0 else 20
    states = [state for state, _ in follow([*rows[:10], *[tuple(bad)] * 30])]
    assert len(states) == 10 + patience and REASONS[int(states[-1].ended)] == REASONS[3]
    assert 0 < states[-1].cap < 0.3 * 1e-6 * 2 ** (9 / 3) + 1e-12
    # Where nothing was moved yet, nothing is to blame.
    assert len(list(follow([(math.nan,) * 4] * 50))) == 50


def problem(seed=0, rows=8, noise=0.3, dtype=torch.float64):
    """Least squares on batches with noise; parameters in two shapes, and the loss and gradient of their vector."""
    rng = np.random.default_rng(seed)
    inputs, truth, noise = (
        rng.standard_normal((70, rows, 7)),
        rng.standard_normal(7),
        noise * rng.standard_normal((70, rows)),
    )
    inputs = inputs * np.array([3, 1, 1, 1, 0.3, 0.3, 0.1])
    x = rng.standard_normal(7)

    def gradient(x, k):
        error = inputs[k] @ (x - truth) - noise[k]
        return np.mean(error**2), 2 / rows * inputs[k].T @ error

    params = [
        nn.Parameter(torch.tensor(x[:6], dtype=dtype).view(2, 3)),
        nn.Parameter(torch.tensor(x[6:], dtype=dtype)),
    ]

    def backward(k, clip=None):
        loss, g = gradient(torch.cat([p.detach().flatten() for p in params]).double().numpy(), k)
        kappa = 1.0 if clip is None else min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        g = torch.tensor(kappa * g, dtype=dtype)
        params[0].grad, params[1].grad = g[:6].view(2, 3).clone(), g[6:].clone()
        return torch.tensor(loss), None if clip is None else kappa

    return x, gradient, params, backward


def search(optimizer, backward, clip=None):
    """Steps until the search is over; the number of them."""
    for k in range(1, 70):
        loss, kappa = backward(k, clip)
        if kappa is not None:
            optimizer.set_clip_factor(kappa)
        optimizer.step(loss=loss)
        if optimizer.search.cap is not None:
            return k
    raise AssertionError("the search does not end")


class Own(MomoOptimizer):
    """A method of a user, with nothing but what every method has."""

    def __init__(self, params, lr="auto"):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "lb": 0.0, "beta": 0.9})


class Scale(Adam):
    ramp_start = None


class Scaled(MomoAdam):
    """Another one, that does not know how long its steps are."""

    methods = {"scale": Scale()}


ARGUMENTS = {
    Momo: {"beta2": None, "start": None, "corrected": False},
    Own: {"beta2": None, "start": None, "corrected": False},
    MomoAdam: {},
    Scaled: {"start": None},
}


@pytest.mark.parametrize("cls", ARGUMENTS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_ramp_takes_plain_steps_of_the_method(cls, clip, seed):
    x, gradient, params, backward = problem(seed)
    optimizer = cls([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}], lr="auto")
    assert optimizer.search == (None, 0, "", [], [], [])
    before = [p.detach().clone() for p in params]
    steps = search(optimizer, backward, clip)
    rows, reason, cap = ramp(x, gradient, clip=clip, **ARGUMENTS[cls])
    found = optimizer.search
    assert found.steps == steps == len(rows) and found.reason == reason
    np.testing.assert_allclose(found.losses, [row[0] for row in rows], rtol=1e-9)
    np.testing.assert_allclose(found.cap, cap, rtol=1e-9)
    np.testing.assert_allclose(found.step_sizes, found.step_sizes[0] * 2 ** (np.arange(steps) / 3), rtol=1e-12)
    r = np.clip([row[1] / last[2] for row, last in zip(rows[1:], rows)], -1, 1)
    np.testing.assert_allclose(found.sums, [0, *np.cumsum(r - 0.15)], rtol=1e-7, atol=1e-9)
    assert all(torch.equal(p, x) for p, x in zip(params, before))
    assert not any(value.any() for p in params for name, value in optimizer.state[p].items() if name != "origin")


@pytest.mark.parametrize("cls, power", [(Momo, 1), (MomoAdam, 0)])
def test_the_cap_has_the_scale_of_a_step(cls, power):
    """With a loss 1024 times as large, steps along the gradient are to be as much shorter, Adam's are not."""
    caps = []
    for scale in (1.0, 1024.0):
        _, _, params, backward = problem()
        optimizer = cls(params, lr="auto", **({"eps": 0.0} if cls is MomoAdam else {}))
        while optimizer.search.cap is None:
            loss, _ = backward(optimizer.search.steps + 1)
            for p in params:
                p.grad *= scale
            optimizer.step(loss=scale * loss)
        caps.append(optimizer.search.cap * scale**power)
    assert caps[1] == pytest.approx(caps[0], rel=1e-9)


@both
def test_after_it_training_begins_as_with_an_lr_that_warms_up_to_the_cap_and_falls_with_the_loss(cls):
    _, _, params, backward = problem()
    optimizer = cls(params, lr="auto", weight_decay=0.1)
    factor = lambda j: 1.0 if j < 70 else 0.1  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda j: factor(j + 1))
    steps = search(optimizer, backward)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fresh, losses, falls = cls(others, lr=0.0, weight_decay=0.1), [], []
    for j in range(1, 101):
        loss, _ = backward(j % 60)
        for p, q in zip(params, others):
            q.grad = p.grad.clone()
        falls.append(fall(optimizer.search.losses, losses, corrected=cls is MomoAdam))
        losses.append(float(loss))
        fresh.param_groups[0]["lr"] = optimizer.search.cap * min(1.0, j / steps) * falls[-1] * factor(j)
        optimizer.step(loss=loss)
        scheduler.step()
        fresh.step(loss=loss)
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        for name in ("effective_lr", "drift", "loss_avg", "capped"):
            torch.testing.assert_close(optimizer.param_groups[0][name], fresh.param_groups[0][name])
    assert falls[0] == 1 and min(falls) < 0.9
    assert all("origin" not in optimizer.state[p] for p in params)
    assert optimizer.search.steps == steps


def test_a_given_lr_means_no_search():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=0.1)
    train(optimizer, backward, 3)
    assert optimizer.search is None
    assert not any("search" in key for key in optimizer.param_groups[0])
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}


def test_no_value_leaves_the_device_but_the_verdict(monkeypatch):
    as_on_a_device(monkeypatch)
    _, _, params, backward = problem(dtype=torch.float32)
    steps = search(MomoAdam(params, lr="auto"), backward)
    optimizer = MomoAdam(params, lr="auto")
    for k in range(1, steps + 3):
        loss, _ = backward(k)
        optimizer.searching  # noqa: B018 - what a step does at its beginning; it waits for nothing by then
        with NoReads():
            optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["step"] == 2


@pytest.mark.parametrize("place", ["meta", "meta:1"])
def test_the_verdict_of_a_device_is_waited_for_where_it_was_given(place, monkeypatch):
    """A simulated accelerator: the copy is recorded behind the step on the device's stream, and read when it is there."""
    done = []

    class Event:
        def __init__(self, kind):
            assert kind == "meta"

        def record(self, stream):
            done.append(stream)

        def synchronize(self):
            done.append("arrived")

    class OnDevice(torch.Tensor):
        device = torch.device(place)

        def to(self, target, non_blocking):
            assert target == "cpu" and non_blocking
            return torch.tensor([1.0, 2.0, 3.0])

    monkeypatch.setattr(torch, "stack", lambda values: OnDevice())

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    verdict = Verdict(new_search(torch.zeros(())))
    assert done == [f"stream of {place}"]
    assert verdict.over() and done[1:] == ["arrived"]
