"""The rule of a search for the cap in Triton, in one launch: `search.next_move` and `search.verdict`.

To be read beside `search`, line by line; every symbol is explained there. What has an entry per step of the ramp is a vector
of a power of two of entries.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import INFINITY, clamp, finite, minimum
from momo_hf.optim.steps import search


# The 0-dim fields of `SearchState`, in their order.
K, START, NORM, TOTAL, HIGHEST, HIGHEST_STEP, DROPPED, ENDED, CAP, SCALARS = (tl.constexpr(i) for i in range(10))
# Entries of a vector: at least `STEPS`.
LANES = tl.constexpr(64)

OCTAVE, STEPS, LEFT, FIRST = map(tl.constexpr, (search.OCTAVE, search.STEPS, search.LEFT, search.FIRST))
CERTAIN, DROP, NOISE = map(tl.constexpr, (search.CERTAIN, search.DROP, search.NOISE))
WINDOW, JUMP, SCATTER = map(tl.constexpr, (search.WINDOW, search.JUMP, search.SCATTER))
MEDIAN_DISTANCE, TINY = map(tl.constexpr, (search.MEDIAN_DISTANCE, search.TINY))
CAP_FACTOR, WEAK, FALLBACK = map(tl.constexpr, (search.CAP_FACTOR, search.WEAK, search.FALLBACK))
OF_POLYAK, PATIENCE, LOST = map(tl.constexpr, (search.OF_POLYAK, search.PATIENCE, search.LOST))
OVERSHOOT, HARM, NOT_FINITE = map(tl.constexpr, (search.OVERSHOOT, search.HARM, search.NOT_FINITE))
RAMP, NOTHING = map(tl.constexpr, (search.RAMP, search.NOTHING))


@triton.jit
def _size_of(start, step):
    return start * tl.exp2((step - 1) / OCTAVE)


@triton.jit
def _ranks(values):
    """How many are smaller than each, of equal ones those before it."""
    lane = tl.arange(0, LANES)
    equal = values[None, :] == values[:, None]
    before = (values[None, :] < values[:, None]) | (equal & (lane[None, :] < lane[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _numbers(values):
    """NaN comes last in the order, as infinity."""
    return tl.where(values == values, values, INFINITY)


@triton.jit
def _of_rank(values, ranks, rank):
    return tl.sum(tl.where(ranks == rank, values, 0.0), 0)


@triton.jit
def _median_of_first(values, count):
    values = _numbers(values)
    ranks = _ranks(values)
    low, high = clamp(tl.floor((count - 1) / 2), 0.0), clamp(tl.floor(count / 2), 0.0)
    return (_of_rank(values, ranks, low) + _of_rank(values, ranks, high)) / 2


@triton.jit
def _vector(old, new, field: tl.constexpr, value, place):
    """A vector with a value in place of the one that is at a place, counted from 1."""
    lane = tl.arange(0, LANES)
    values = tl.load(old + lane, mask=lane < STEPS, other=float("nan"))
    values = tl.where(lane + 1 == place, value, values)
    tl.store(new + SCALARS + field * STEPS + lane, values, mask=lane < STEPS)
    return values


@triton.jit
def _keep(old, new, field: tl.constexpr, value, ok):
    kept = tl.where(ok, value, tl.load(old + field))
    tl.store(new + field, kept)
    return kept


@triton.jit
def next_move(
    old,
    old_left,
    old_samples,
    old_losses,
    old_sums,
    loss,
    slope,
    norm,
    sample,
    clip_factor,
    new,
    size,
    moves,
    returns,
    begins,
    lb,
    start,
    clipped: tl.constexpr,
    starts: tl.constexpr,
):
    """`search.next_move`: from the old state to the new one, its vectors one after the other, and the move.

    Args:
        starts: whether `start` is the first step size; otherwise it comes of loss and gradient.
    """
    step = tl.load(old + K) + 1
    first = step == 1
    f, n, h = tl.load(loss), tl.load(norm), tl.load(sample)
    g = tl.where(first, 0.0, tl.load(slope))
    kappa = tl.full((), 1.0, tl.float32)
    if clipped:
        kappa = tl.load(clip_factor)
        h = h / kappa
    ok = finite(f) & finite(g) & finite(n) & finite(h) & finite(kappa) & (kappa > 0)

    low = tl.zeros((), tl.float32) + lb
    begin = tl.zeros((), tl.float32) + start
    if not starts:
        gap = f - low
        if clipped:
            gap = low + kappa * (f - low) - low
        begin = OF_POLYAK * tl.where((gap > 0) & (n > 0), gap / n, 1.0)
    begin = tl.where(first, begin, tl.load(old + START))
    tl.store(size, _size_of(begin, step))

    r = tl.where(first, float("nan"), g / clamp(tl.load(old + NORM), TINY))
    total = tl.where(first, 0.0, tl.load(old + TOTAL) + minimum(clamp(r, -1.0), 1.0) - LEFT)
    old_highest = tl.load(old + HIGHEST)
    higher = total > old_highest
    k = _keep(old, new, K, step, ok)
    begin = _keep(old, new, START, begin, ok)
    _keep(old, new, NORM, n, ok)
    highest_step = tl.where(higher, step - 1, tl.load(old + HIGHEST_STEP))
    highest_step = _keep(old, new, HIGHEST_STEP, highest_step, ok)
    highest = _keep(old, new, HIGHEST, tl.where(higher, total, old_highest), ok)
    place = tl.where(ok, step, 0.0)  # a step that is dropped has none
    left = _vector(old_left, new, 0, r, place)
    samples = _vector(old_samples, new, 1, h, place)
    _vector(old_losses, new, 2, f, place)
    _vector(old_sums, new, 3, total, place)
    total = _keep(old, new, TOTAL, total, ok)
    dropped = tl.load(old + DROPPED) + tl.where(finite(f), 1.0, LOST)
    dropped = tl.where(ok, 0.0, dropped)
    tl.store(new + DROPPED, dropped)

    # The verdict.
    lane = tl.arange(0, LANES)
    following = tl.load(old_left + lane + 1, mask=lane + 1 < STEPS, other=float("nan"))
    following = tl.where(lane + 2 == place, r, following)
    noise = tl.where(k > 4, _median_of_first(tl.abs(following - left), k - 2) / MEDIAN_DISTANCE, INFINITY)
    strong = (highest_step > 0) & (highest >= CERTAIN * noise * tl.sqrt(highest_step))
    recent = _numbers(tl.where((lane < k) & (lane >= k - WINDOW), samples, float("nan")))
    following = tl.load(old_samples + lane + 1, mask=lane + 1 < STEPS, other=float("nan"))
    following = tl.where(lane + 2 == place, h, following)
    distances = tl.abs(tl.log(clamp(following, TINY)) - tl.log(clamp(samples, TINY)))
    harmed = clamp(tl.exp(_median_of_first(distances, k - 1) * (SCATTER / MEDIAN_DISTANCE)), JUMP)
    risen = _of_rank(recent, _ranks(recent), WINDOW // 2) > harmed * _median_of_first(samples, k)

    overshoot = strong & (highest - total >= clamp(NOISE * noise, DROP))
    early = k <= FIRST
    reason = tl.where(k >= STEPS, tl.where(strong, RAMP, NOTHING), 0.0)
    reason = tl.where((early == 0) & (strong == 0) & risen, HARM, reason)
    reason = tl.where((early == 0) & overshoot, OVERSHOOT, reason)
    reason = tl.where(ok, reason, tl.where((dropped >= PATIENCE) & (k > 0), NOT_FINITE, 0.0))

    end = _size_of(begin, clamp(k, 1.0))
    turn = _size_of(begin, clamp(highest_step, 1.0))
    cap = CAP_FACTOR * tl.sqrt(tl.where(strong, turn, WEAK * end) * end)
    cap = tl.where(reason == NOTHING, minimum(CAP_FACTOR * tl.sqrt(turn * end), FALLBACK * begin), cap)
    back = reason > 0
    tl.store(new + ENDED, reason)
    tl.store(new + CAP, tl.where(back, cap, 0.0))
    tl.store(moves, ok & (back == 0))
    tl.store(returns, back)
    tl.store(begins, first)
