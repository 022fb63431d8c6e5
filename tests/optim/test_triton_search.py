"""The rule of the search in Triton, run by Triton's interpreter, against the same rule on tensors."""

import math
from itertools import pairwise
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momo_hf.optim.kernels import launch, scalars
from momo_hf.optim.steps import search
from momo_hf.optim.steps.search import REASONS, new_search


pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "runs_on", lambda device: True)
        yield


def assert_same(ours, expected):
    for x, y in zip(ours, expected):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)


def last_steps(seed, steps, turn, noise, harm=None, bad=(), **how):
    """The last step of a search, or of its first steps, by the kernel and by the formulas.

    Args:
        seed: of the noise.
        steps: after which it is left.
        turn: the step from which on slopes are below 0.
        noise: in the slopes, where these have size 1.
        harm: the step from which on samples are large.
        bad: the steps on which some number is not finite.
        how: the options of `next_move`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn((), generator=generator)

    after = new_search(torch.zeros(()))
    for step in range(steps):
        slope, norm = (1.0 if step < turn else -0.8) + noise * normal(), normal().exp()
        sample = normal().exp() * (100.0 if harm is not None and step > harm else 1.0)
        before = after
        given = [2.0 + normal(), slope * before.norm, norm, sample]
        if step in bad:
            given[(seed + step) % 4] = torch.tensor(BAD[step % 3])
        after, move = search.next_move(before, *given, **how)
        if after.ended:
            break
    return scalars.next_move(before, *given, **how), (after, move)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 69),
    turn=st.integers(5, 70),
    noise=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    harm=st.sampled_from([None, 15, 40]),
    bad=st.sets(st.integers(0, 68), max_size=6),
    start=st.sampled_from([None, 1e-6]),
    clip_factor=st.sampled_from([None, 0.3]),
)
def test_a_step_is_that_of_the_formulas(clip_factor, **how):
    kappa = None if clip_factor is None else torch.tensor(clip_factor)
    ours, expected = last_steps(lb=-0.5, clip_factor=kappa, **how)
    assert_same(ours[0], expected[0])
    assert_same(ours[1], expected[1])


@pytest.mark.parametrize(
    "reason, how",
    [
        ("overshoot", {"turn": 30, "noise": 0.1}),
        ("harm", {"turn": 99, "noise": 30.0, "harm": 30}),
        ("the loss or a gradient was not finite", {"turn": 99, "noise": 0.1, "bad": range(20, 69)}),
        ("the end of the ramp", {"turn": 99, "noise": 0.1}),
        ("nothing found", {"turn": 99, "noise": 30.0}),
    ],
)
@pytest.mark.parametrize("start", [None, 1e-6])
def test_every_end(reason, how, start):
    ours, expected = last_steps(seed=2, steps=99, lb=0.0, start=start, **how)
    assert REASONS[int(ours[0].ended)] == reason and ours[1].back and 0 < ours[0].cap < 100
    assert_same(ours[0], expected[0])
    assert_same(ours[1], expected[1])


@pytest.mark.parametrize("k", [13, 20, 41, 58])
@pytest.mark.parametrize("margin, reason", [(0.999, ""), (1.001, "overshoot")])
def test_the_signal_is_compared_with_the_median_of_distances(k, margin, reason):
    state, left = filled(k)
    distances = [abs(x - y) for x, y in pairwise([*left[1:], 0.1])]
    highest = search.CERTAIN * median(distances) / search.MEDIAN_DISTANCE * (k - 3) ** 0.5 * margin
    state = state._replace(highest=torch.tensor(highest), highest_step=torch.tensor(k - 3.0))
    one = torch.tensor(1.0)
    state, _ = scalars.next_move(state, one, torch.tensor(0.1), one, one, lb=0.0, start=1e-6)
    assert REASONS[int(state.ended)] == reason


@pytest.mark.parametrize("k", [13, 20, 41, 58])
@pytest.mark.parametrize("margin, reason", [(0.999, ""), (1.001, "harm")])
def test_the_last_samples_are_compared_with_the_median_of_all(k, margin, reason):
    state, _ = filled(k)
    samples = [float(i % 7 + 1) for i in range(k)]
    for i in range(-3, 0):  # most of the last five, but the last one is not in the state yet
        samples[i] = margin * search.JUMP * median([*samples[:-3], *3 * [1e9]])
    state.samples[: k - 1] = torch.tensor(samples[:-1])
    one = torch.tensor(1.0)
    state, _ = scalars.next_move(state, one, one, one, torch.tensor(samples[-1]), lb=0.0, start=1e-6)
    assert REASONS[int(state.ended)] == reason


def filled(k):
    """A search before step k, which has found nothing, and what its steps have left of the slope."""
    generator = torch.Generator().manual_seed(k)
    left = torch.cat([torch.tensor([math.nan]), torch.randn(k - 2, generator=generator)])
    state = new_search(torch.zeros(()))
    state.left[: k - 1], state.samples[: k - 1] = left, 1.0
    state = state._replace(steps=torch.tensor(k - 1.0), start=torch.tensor(1e-6), norm=torch.tensor(1.0))
    return state._replace(total=torch.tensor(-1e3)), left.tolist()


@pytest.mark.parametrize("kappa", [0.0, -0.5, math.nan, math.inf])
def test_a_clip_factor_that_is_none_drops_the_step(kappa):
    state, one = new_search(torch.zeros(())), torch.tensor(1.0)
    given = {"lb": 0.0, "start": None, "clip_factor": torch.tensor(kappa)}
    state, move = scalars.next_move(state, one, one, one, one, **given)
    assert not move.accepted and state.dropped == 1 and state.steps == 0
