"""The search for the cap: a ramp of ever longer steps, and the rule that ends it.

The size of a good step is neither in the loss nor in the gradient of one point; it is in what happens when one moves.
So with `lr="auto"` training begins with plain steps of the method, `x <- x - α_k u_k`, whose size α_k doubles every
three steps, and goes back to where it began when it has seen enough. Per step the rule is given the loss and three inner
products, with u = D^{-1} d / ρ the direction of a step:

* slope `<g_k, u_{k-1}>`. The new gradient knows nothing of the step before, so over `<d, u>` of that step it is an
  unbiased share r_k of the slope that the step has left: about 1 while steps are short, 0 where a step ends at the minimum
  along its line (on a quadratic r = 1 - α/α*), below 0 where it goes beyond. S sums `r - LEFT`, with r in [-1, 1].
  Where S is largest, steps have ceased to leave a slope: that is α_S.
* norm `<d_k, u_k>`, what the next slope is compared with.
* sample `<g_k, D_k^{-1} g_k>`, over the factor that gradients were clipped by. It rises where steps do harm, by far
  more than it scatters.

The signal is strong where S has risen far above what noise makes of as many steps. Then its fall ends the search
("overshoot"). Without one a rise of `sample` does ("harm"), or losses that are not finite, or the end of the ramp. With
α_end the size at the end, the cap is `CAP_FACTOR √(α_S α_end)`.

Everything here is arithmetic on 0-dim tensors and on vectors with one entry per step of the ramp: no parameters, no
Python branch on a value.
"""

from typing import NamedTuple

import torch
from torch import Tensor, arange, full_like, stack, where

from momo_hf.optim.steps.model import clip_gap


# The ramp: steps that double the size, and steps at most. Slower growth finds no better caps and costs more steps.
OCTAVE, STEPS = 3, 60
# r below which a step counts as one that left no slope; above 0, because a step that goes all the way is too long.
LEFT = 0.15
# S must rise to CERTAIN times the noise of a sum of as many terms to be a signal, and end the search by falling by DROP,
# or by NOISE times the noise of one term where that is more.
CERTAIN, DROP, NOISE = 4.0, 2.0, 6.0
# Harm is a median of the last WINDOW samples above JUMP times that of all; or above e to the SCATTER times the noise of their
# logarithms where that is more: on a plateau they scatter over a decade, and 3 times would be an accident in every other search.
WINDOW, JUMP, SCATTER = 5, 3.0, 2.0
# Steps before the search may end: medians of fewer say nothing.
FIRST = 12
TINY = 1e-30
# The median of the distance of two normal numbers is 0.95 standard deviations.
MEDIAN_DISTANCE = 0.95
# The cap is CAP_FACTOR √(α_S α_end); without a strong signal α_S is WEAK α_end, and where nothing was found at all the cap
# is at most FALLBACK times the first step size: 3e-4 for MoMo-Adam, which is an lr for fine-tuning.
CAP_FACTOR, WEAK, FALLBACK = 0.3, 0.1, 3e2
# The first step size of a method without a preconditioner: this times (f - lb) / |g|², Polyak's step at the start.
OF_POLYAK = 1e-4
# Steps in a row that may be dropped before the ramp itself is to blame. A loss that is not finite counts for LOST of them:
# a second batch decides whether it was the batch. A loss scaler begins at 2^16 and halves at every overflow.
PATIENCE, LOST = 20, 10

# The text that an `lr` may be.
AUTO = "auto"

# Why a search ended, by `SearchState.ended`.
REASONS = ("", "overshoot", "harm", "the loss or a gradient was not finite", "the end of the ramp", "nothing found")
OVERSHOOT, HARM, NOT_FINITE, RAMP, NOTHING = 1.0, 2.0, 3.0, 4.0, 5.0


class SearchState(NamedTuple):
    """What the search remembers; every entry is a tensor of at least float32.

    Attributes:
        steps: number k of steps of the ramp, dropped ones not counted; 0-dim, as all up to `cap`.
        start: α_1.
        norm: `<d, u>` of step k.
        total: S.
        highest: the largest S so far, 0 at least.
        highest_step: the step j at which S was largest after it; α_S is its size.
        dropped: dropped steps in a row, see `PATIENCE`.
        ended: 0 while the search goes on, then the place in `REASONS`.
        cap: what was found; 0 before.
        left: r_k, shape (STEPS,), as all that follow.
        samples: `sample` of every step.
        losses: f_k.
        sums: S_k.
    """

    steps: Tensor
    start: Tensor
    norm: Tensor
    total: Tensor
    highest: Tensor
    highest_step: Tensor
    dropped: Tensor
    ended: Tensor
    cap: Tensor
    left: Tensor
    samples: Tensor
    losses: Tensor
    sums: Tensor


class Move(NamedTuple):
    """What to do with the parameters; 0-dim each.

    Attributes:
        size: α_k.
        accepted: whether to take in the gradient and to step; bool.
        back: whether to go back to where the search began; bool.
        begins: whether the search begins here, so that this is where to go back to; bool.
    """

    size: Tensor
    accepted: Tensor
    back: Tensor
    begins: Tensor

    @property
    def factor(self) -> Tensor:
        """What the groups show as the step size."""
        return self.size


def new_search(like: Tensor) -> SearchState:
    """A search that has not begun, with dtype and device of `like`."""
    zero, empty = torch.zeros_like(like), like.new_full((STEPS,), torch.nan)
    vectors = ("left", "samples", "losses", "sums")
    return SearchState(*((empty if name in vectors else zero).clone() for name in SearchState._fields))


def size_of(start: Tensor, step: Tensor) -> Tensor:
    """α of a step of the ramp."""
    return start * ((step - 1) / OCTAVE).exp2()


def median_of_first(values: Tensor, count: Tensor) -> Tensor:
    """The median of the `count` values that are numbers; the others are NaN."""
    ordered = values.sort().values  # NaN comes last
    middle = stack([(count - 1) // 2, count // 2]).long().clamp(0, len(values) - 1)
    return ordered.take(middle).mean()


def next_move(
    state: SearchState,
    loss: Tensor,
    slope: Tensor,
    norm: Tensor,
    sample: Tensor,
    *,
    lb: float,
    start: float | None,
    clip_factor: Tensor | None = None,
) -> tuple[SearchState, Move]:
    """One step of the ramp: from the loss and the inner products of step k to what to do.

    Args:
        state: the state after step k-1.
        loss: f_k, 0-dim, as the inner products.
        slope: `<g_k, u_{k-1}>`; not used on the first step.
        norm: `<d_k, u_k>`, with d in it corrected by ρ as well as u.
        sample: `<g_k, D_k^{-1} g_k>`.
        lb: the lower bound of the loss.
        start: α_1, or None to make it from the first loss and gradient.
        clip_factor: κ, by which the gradients were scaled before they were seen here, or None.

    Returns:
        The state after step k and the move. Where something is not finite the step is dropped: the state is the old one,
        apart from `dropped` and what ends the search.
    """
    old, step = state, state.steps + 1  # k
    first, place = step == 1, arange(STEPS, device=loss.device) + 1
    slope = where(first, 0.0, slope)
    sample = sample if clip_factor is None else sample / clip_factor
    numbers = [loss, slope, norm, sample, *([] if clip_factor is None else [clip_factor.log()])]
    ok = stack(numbers).isfinite().all()

    if start is None:
        gap = clip_gap(loss, clip_factor, full_like(loss, lb)) - lb
        begin = OF_POLYAK * where((gap > 0) & (norm > 0), gap / norm, 1.0)
    else:
        begin = full_like(loss, start)
    begin = where(first, begin, state.start)
    size = size_of(begin, step)  # α_k

    r = where(first, torch.nan, slope / state.norm.clamp(min=TINY))
    total = where(first, 0.0, state.total + r.clamp(-1, 1) - LEFT)  # S
    higher = total > state.highest
    new = SearchState(
        steps=step,
        start=begin,
        norm=norm,
        total=total,
        highest=where(higher, total, state.highest),
        highest_step=where(higher, step - 1, state.highest_step),
        dropped=torch.zeros_like(step),
        ended=state.ended,
        cap=state.cap,
        **{
            name: where(place == step, value, getattr(state, name))
            for name, value in (("left", r), ("samples", sample), ("losses", loss), ("sums", total))
        },
    )
    state = SearchState(*(where(ok, ours, theirs) for ours, theirs in zip(new, old)))
    weight = where(loss.isfinite(), 1.0, full_like(loss, LOST))
    state = state._replace(dropped=where(ok, 0.0, old.dropped + weight))
    reason, cap = verdict(state, ok)
    back = reason > 0
    return state._replace(ended=reason, cap=where(back, cap, 0.0)), Move(size, ok & ~back, back, first)


def verdict(state: SearchState, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the search is over after a step: the place in `REASONS` or 0, and the cap.

    Args:
        state: after the step.
        ok: whether the step was not dropped.
    """
    k = state.steps
    distances = state.left.diff().abs()
    noise = where(k > 4, median_of_first(distances, k - 2) / MEDIAN_DISTANCE, torch.inf)
    strong = (state.highest_step > 0) & (state.highest >= CERTAIN * noise * state.highest_step.sqrt())
    recent = (k - WINDOW + arange(WINDOW, device=k.device)).long().clamp(min=0)
    scatter = median_of_first(state.samples.clamp(min=TINY).log().diff().abs(), k - 1) / MEDIAN_DISTANCE
    harmed = (SCATTER * scatter).exp().clamp(min=JUMP) * median_of_first(state.samples, k)
    risen = state.samples.take(recent).median() > harmed

    overshoot = strong & (state.highest - state.total >= (NOISE * noise).clamp(min=DROP))
    early, last = k <= FIRST, k >= STEPS
    reason = where(last, where(strong, RAMP, NOTHING), 0.0).to(k.dtype)
    reason = where(~early & ~strong & risen, HARM, reason)
    reason = where(~early & overshoot, OVERSHOOT, reason)
    # Before the first step nothing was moved, so that nothing can be undone.
    reason = where(ok, reason, where((state.dropped >= PATIENCE) & (k > 0), NOT_FINITE, 0.0).to(k.dtype))

    end = size_of(state.start, k.clamp(min=1))
    turn = size_of(state.start, state.highest_step.clamp(min=1))  # α_S
    cap = CAP_FACTOR * (where(strong, turn, WEAK * end) * end).sqrt()
    fallback = (CAP_FACTOR * (turn * end).sqrt()).minimum(FALLBACK * state.start)
    return reason, where(reason == NOTHING, fallback, cap)


class Search(NamedTuple):
    """What a search has seen, read from the device.

    Attributes:
        cap: the step size that was found; None while the search goes on.
        steps: the number of its steps.
        reason: why it ended; empty while it goes on.
        step_sizes: α_k, one entry per step, as all that follow.
        losses: f_k.
        sums: S_k.
    """

    cap: float | None
    steps: int
    reason: str
    step_sizes: list[float]
    losses: list[float]
    sums: list[float]


def read_search(state: SearchState) -> Search:
    """The search in Python's numbers; the host waits for the device."""
    steps, reason = int(state.steps), REASONS[int(state.ended)]
    sizes = size_of(state.start, arange(steps, dtype=state.start.dtype, device=state.start.device) + 1)
    rows = (values[:steps].tolist() for values in (sizes, state.losses, state.sums))
    return Search(float(state.cap) if reason else None, steps, reason, *rows)
