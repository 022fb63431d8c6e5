"""The formulas of `model` and `averaged_model` in Triton, one launch each: what is known before the first pass, and the steps.

To be read beside these, line by line; every symbol is explained there. One program does it all: a number is a scalar,
and what has an entry per parameter group is a vector, filled up with zeros.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import (
    LARGEST,
    average_weight,
    clamp,
    debias,
    every,
    finite,
    flag,
    lerp,
    minimum,
)


# The fields of `ModelState`, in their order, and those of `AverageState` after them.
STEP, LOSS_AVG, DRIFT, FSTAR, POLYAK_LR, CAPPED, SKIPPED, STALLED, RAW_LOSS_AVG = (tl.constexpr(i) for i in range(9))
GAP_AVG, NORM_AVG, TAU_MAX, WEIGHT_SUM = (tl.constexpr(i) for i in range(9, 13))


@triton.jit
def begin(
    before,
    loss,
    lr,
    weight_decay,
    clip_factor,
    norm,
    step,
    weight,
    inputs_valid,
    groups,
    clipped: tl.constexpr,
    normed: tl.constexpr,
    beta: tl.constexpr,
    bias_correction: tl.constexpr,
    block: tl.constexpr,
):
    """k, the weight of its sample, and `acceptable`."""
    k = tl.load(before) + 1
    tl.store(step, k)
    tl.store(weight, average_weight(k, beta, bias_correction))
    group = tl.arange(0, block)
    alpha = _entries(lr, group, groups, 1)
    decay = _entries(weight_decay, group, groups, 1)
    ok = every(finite(alpha) & finite(decay) & (alpha >= 0)) & finite(tl.load(loss))
    if clipped:
        kappa = tl.load(clip_factor)
        ok = ok & finite(kappa) & (kappa >= 0)
    if normed:
        ok = ok & finite(tl.load(norm))
    tl.store(inputs_valid, ok)


@triton.jit
def _keep(old, new, field: tl.constexpr, value, ok):
    """The value of a field, or the old one on a skipped step."""
    tl.store(new + field, tl.where(ok, value, tl.load(old + field)))


@triton.jit
def _entries(vector, group, groups, stride: tl.constexpr):
    """What a vector has for the groups; 0 for those that fill it up."""
    return tl.load(vector + group * stride, mask=group < groups, other=0.0)


@triton.jit
def _keep_model(old, new, step, fstar, polyak, capped, stalled, raw, ok):
    """What both steps write into the fields of `ModelState` alike."""
    _keep(old, new, STEP, step, ok)
    _keep(old, new, FSTAR, fstar, ok)
    _keep(old, new, POLYAK_LR, polyak, ok)
    _keep(old, new, CAPPED, tl.load(old + CAPPED) + capped.to(tl.float32), ok)
    tl.store(new + SKIPPED, tl.load(old + SKIPPED) + tl.where(ok, 0.0, 1.0))
    _keep(old, new, STALLED, tl.load(old + STALLED) + stalled.to(tl.float32), ok)
    _keep(old, new, RAW_LOSS_AVG, raw, ok)


@triton.jit
def next_step(
    old,
    loss,
    dual_norm_sq,
    overlap,
    grad_norm_sq,
    lr,
    weight_decay,
    inputs_valid,
    clip_factor,
    new,
    factor,
    decay,
    good,
    strayed,
    lb,
    groups,
    stride: tl.constexpr,
    clipped: tl.constexpr,
    beta: tl.constexpr,
    log_beta: tl.constexpr,
    bias_correction: tl.constexpr,
    use_fstar: tl.constexpr,
    divide: tl.constexpr,
    block: tl.constexpr,
):
    """`model.next_step`: from the old state to the new one, and the step to take."""
    group = tl.arange(0, block)
    mask = group < groups
    n = _entries(dual_norm_sq, group, groups, stride)
    s = _entries(overlap, group, groups, stride)
    size = _entries(grad_norm_sq, group, groups, stride)
    alpha = _entries(lr, group, groups, 1)
    lam = _entries(weight_decay, group, groups, 1)
    f = tl.load(loss)

    moved_before = tl.load(strayed)
    old_drift = tl.load(old + DRIFT) + tl.where(finite(moved_before), moved_before, 0.0)
    cap = tl.max(alpha, 0)
    ratio = tl.where(cap > 0, alpha / cap, 0.0)
    a = alpha * lam
    step = tl.load(old + STEP) + 1
    rho = tl.full((), 1.0, tl.float32)
    if bias_correction:
        rho = debias(step, log_beta)
    fstar = tl.load(old + FSTAR)
    if not use_fstar:
        fstar = tl.zeros((), tl.float32) + lb

    weight = average_weight(step, beta, bias_correction)
    fed = f
    if clipped:
        fed = fstar + tl.load(clip_factor) * (f - fstar)
    loss_avg = tl.load(old + LOSS_AVG)
    loss_avg = lerp(loss_avg, fed, weight)
    drift = (1.0 - weight) * old_drift
    n, s = n / rho, s / rho
    height = (loss_avg + drift) / rho

    shrunk = tl.sum(s * a / (1 + a), 0)
    value = height - shrunk
    slope = tl.sum(ratio / (1 + a) * n, 0)
    if use_fstar:
        fstar = tl.where(value < fstar, clamp(value / 2, lb), fstar)
    gap = clamp(value - fstar, 0.0)
    moves = slope > 0
    polyak = minimum(tl.where(moves, gap / slope, 0.0), LARGEST)
    tau = tl.where(moves, minimum(polyak, cap), 0.0)

    inner = tl.sum(tau * ratio * n, 0)
    if use_fstar:
        fstar = clamp(height - inner / 2, lb)
    if divide:
        moved = -(tau * slope + shrunk)
    else:
        moved = -(inner + tl.sum(s * a, 0))
    drift += rho * moved
    raw = tl.load(old + RAW_LOSS_AVG)
    raw = lerp(raw, f, weight)

    ok = finite(loss_avg) & finite(drift) & finite(fstar) & finite(polyak) & finite(raw)
    ok = ok & finite(tau) & finite(tl.sum(a, 0)) & finite(fed) & finite(tl.sum(n, 0)) & finite(tl.sum(s, 0))
    ok = ok & finite(slope) & finite(tl.sum(size, 0)) & flag(inputs_valid)
    _keep_model(old, new, step, fstar, polyak, moves & (cap <= polyak), moves & (gap == 0), raw, ok)
    _keep(old, new, LOSS_AVG, loss_avg, ok)
    tl.store(new + DRIFT, tl.where(ok, drift, old_drift))
    tl.store(factor + group, tl.where(ok, tau * ratio, 0.0), mask=mask)
    tl.store(decay + group, tl.where(ok, a, 0.0), mask=mask)
    tl.store(good, ok)


@triton.jit
def next_averaged_step(
    old,
    loss,
    norm_sq,
    ahead,
    overlap,
    taken,
    lr,
    weight_decay,
    inputs_valid,
    clip_factor,
    new,
    factor,
    decay,
    good,
    fraction,
    lb,
    groups,
    stride: tl.constexpr,
    clipped: tl.constexpr,
    beta: tl.constexpr,
    bias_correction: tl.constexpr,
    divide: tl.constexpr,
    power: tl.constexpr,
    polyak: tl.constexpr,
    block: tl.constexpr,
):
    """`averaged_model.next_averaged_step`: from the old states, one after the other, to the new ones, and the step to take."""
    group = tl.arange(0, block)
    mask = group < groups
    n = _entries(norm_sq, group, groups, stride)
    step_ahead = _entries(ahead, group, groups, stride)
    s = _entries(overlap, group, groups, stride)
    v = _entries(taken, group, groups, stride)
    alpha = _entries(lr, group, groups, 1)
    lam = _entries(weight_decay, group, groups, 1)
    f = tl.load(loss)

    cap = tl.max(alpha, 0)
    ratio = tl.where(cap > 0, alpha / cap, 1.0)
    a = alpha * lam
    shrinks = tl.zeros_like(a)
    if divide:
        shrinks = a / (1 + a)
    step = tl.load(old + STEP) + 1
    fstar = tl.zeros((), tl.float32) + lb

    fed = f
    if clipped:
        fed = fstar + tl.load(clip_factor) * (f - fstar)
    gap = clamp(fed - fstar + tl.sum(step_ahead, 0) - tl.sum(shrinks * s, 0), 0.0)
    gap_avg = tl.load(old + GAP_AVG)
    gap_avg = lerp(gap_avg, gap, 1 - beta)
    norm = tl.sum(ratio * (1 - shrinks) * n, 0)
    norm_avg = tl.load(old + NORM_AVG)
    norm_avg = lerp(norm_avg, norm, 1 - beta)
    moves = norm_avg > 0
    reach = minimum(tl.where(moves, polyak * gap_avg / norm_avg, 0.0), LARGEST)
    tau = tl.where(moves, minimum(reach, cap), 0.0)
    tau_max = clamp(tl.load(old + TAU_MAX), tau)
    weight = tau_max * tau_max
    for _ in tl.static_range(power):
        weight *= step
    weight_sum = tl.load(old + WEIGHT_SUM) + weight
    c = tl.where(weight_sum > 0, weight / weight_sum, 0.0)
    raw = tl.load(old + RAW_LOSS_AVG)
    raw = lerp(raw, f, average_weight(step, beta, bias_correction))

    ok = finite(reach) & finite(raw) & finite(gap_avg) & finite(norm_avg) & finite(tau_max) & finite(weight_sum)
    ok = (
        ok
        & finite(tau)
        & finite(tl.sum(a, 0))
        & finite(fed)
        & finite(norm)
        & finite(tl.sum(n, 0))
        & flag(inputs_valid)
    )
    ok = ok & finite(tl.sum(step_ahead, 0)) & finite(tl.sum(s, 0)) & finite(tl.sum(v, 0))
    _keep_model(old, new, step, fstar, reach, moves & (cap <= reach), (gap == 0) & (f <= fstar), raw, ok)
    tl.store(new + LOSS_AVG, tl.load(old + LOSS_AVG))
    tl.store(new + DRIFT, tl.load(old + DRIFT))
    _keep(old, new, GAP_AVG, gap_avg, ok)
    _keep(old, new, NORM_AVG, norm_avg, ok)
    _keep(old, new, TAU_MAX, tau_max, ok)
    _keep(old, new, WEIGHT_SUM, weight_sum, ok)
    tl.store(factor + group, tl.where(ok, tau * ratio, 0.0), mask=mask)
    tl.store(decay + group, tl.where(ok, a, 0.0), mask=mask)
    tl.store(fraction, tl.where(ok, c, 0.0))
    tl.store(good, ok)
