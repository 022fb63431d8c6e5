"""The formulas of `model` in Triton, one launch each: what is known before the first pass, and the step itself.

To be read beside `model`, line by line; every symbol is explained there. One program does it all: a number is a scalar,
and what has an entry per parameter group is a vector, filled up with zeros.
"""

import triton
import triton.language as tl


# The fields of `ModelState`, in their order.
STEP, LOSS_AVG, DRIFT, FSTAR, POLYAK_LR, CAPPED, SKIPPED, STALLED, RAW_LOSS_AVG = (tl.constexpr(i) for i in range(9))
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def _all(x):
    return tl.min(x.to(tl.int32), 0) == 1


@triton.jit
def _clamp(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _average_weight(step, beta: tl.constexpr, bias_correction: tl.constexpr):
    weight = tl.full((), 1.0 - beta, tl.float32)
    if not bias_correction:
        weight = tl.where(step == 1, 1.0, weight)
    return weight


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
    usable,
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
    tl.store(weight, _average_weight(k, beta, bias_correction))
    group = tl.arange(0, block)
    alpha = tl.load(lr + group, mask=group < groups, other=0.0)
    decay = tl.load(weight_decay + group, mask=group < groups, other=0.0)
    ok = _all(_finite(alpha) & _finite(decay) & (alpha >= 0)) & _finite(tl.load(loss))
    if clipped:
        kappa = tl.load(clip_factor)
        ok = ok & _finite(kappa) & (kappa >= 0)
    if normed:
        ok = ok & _finite(tl.load(norm))
    tl.store(usable, ok)


@triton.jit
def _keep(old, new, field: tl.constexpr, value, ok):
    """The value of a field, or the old one on a skipped step."""
    tl.store(new + field, tl.where(ok, value, tl.load(old + field)))


@triton.jit
def next_step(
    old,
    loss,
    dual_norm_sq,
    overlap,
    grad_norm_sq,
    strayed,
    lr,
    weight_decay,
    usable,
    clip_factor,
    new,
    factor,
    effective_lr,
    decay,
    good,
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
    n = tl.load(dual_norm_sq + group * stride, mask=mask, other=0.0)
    s = tl.load(overlap + group * stride, mask=mask, other=0.0)
    size = tl.load(grad_norm_sq + group * stride, mask=mask, other=0.0)
    alpha = tl.load(lr + group, mask=mask, other=0.0)
    lam = tl.load(weight_decay + group, mask=mask, other=0.0)
    f = tl.load(loss)

    moved_before = tl.load(strayed)
    old_drift = tl.load(old + DRIFT) + tl.where(_finite(moved_before), moved_before, 0.0)
    cap = tl.max(alpha, 0)
    ratio = tl.where(cap > 0, alpha / cap, 0.0)
    a = alpha * lam
    step = tl.load(old + STEP) + 1
    rho = tl.full((), 1.0, tl.float32)
    if bias_correction:  # in float64, where the plain formula loses nothing that float32 could hold
        rho = (1.0 - tl.exp(step.to(tl.float64) * log_beta)).to(tl.float32)
    fstar = tl.load(old + FSTAR)
    if not use_fstar:
        fstar = tl.zeros((), tl.float32) + lb

    weight = _average_weight(step, beta, bias_correction)
    fed = f
    if clipped:
        fed = fstar + tl.load(clip_factor) * (f - fstar)
    loss_avg = tl.load(old + LOSS_AVG)
    loss_avg += weight * (fed - loss_avg)
    drift = (1.0 - weight) * old_drift

    shrunk = tl.sum(s * a / (1 + a), 0)
    value = loss_avg + drift - shrunk
    slope = tl.sum(ratio / (1 + a) * n, 0)
    if use_fstar:
        fstar = tl.where(value < rho * fstar, _clamp(value / (2 * rho), lb), fstar)
    bound = cap / rho
    gap = _clamp(value - rho * fstar, 0.0)
    moves = slope > 0
    polyak = _minimum(tl.where(moves, gap / slope, 0.0), LARGEST)
    tau = tl.where(moves, _minimum(polyak, bound), 0.0)

    inner = tl.sum(tau * ratio * n, 0)
    if use_fstar:
        fstar = _clamp((loss_avg + drift - inner / 2) / rho, lb)
    if divide:
        moved = -(tau * slope + shrunk)
    else:
        moved = -(inner + tl.sum(s * a, 0))
    drift += moved
    polyak_lr = polyak * rho
    raw = tl.load(old + RAW_LOSS_AVG)
    raw += weight * (f - raw)

    ok = _finite(loss_avg) & _finite(drift) & _finite(fstar) & _finite(polyak_lr) & _finite(raw)
    ok = ok & _finite(tau) & _finite(tl.sum(a, 0)) & _finite(fed) & _finite(tl.sum(n, 0)) & _finite(tl.sum(s, 0))
    ok = ok & _finite(slope) & _finite(tl.sum(size, 0)) & (tl.load(usable).to(tl.int32) != 0)
    _keep(old, new, STEP, step, ok)
    _keep(old, new, LOSS_AVG, loss_avg, ok)
    tl.store(new + DRIFT, tl.where(ok, drift, old_drift))
    _keep(old, new, FSTAR, fstar, ok)
    _keep(old, new, POLYAK_LR, polyak_lr, ok)
    _keep(old, new, CAPPED, tl.load(old + CAPPED) + (moves & (bound <= polyak)).to(tl.float32), ok)
    tl.store(new + SKIPPED, tl.load(old + SKIPPED) + tl.where(ok, 0.0, 1.0))
    _keep(old, new, STALLED, tl.load(old + STALLED) + (moves & (gap == 0)).to(tl.float32), ok)
    _keep(old, new, RAW_LOSS_AVG, raw, ok)
    tl.store(factor + group, tl.where(ok, tau * ratio, 0.0), mask=mask)
    tl.store(effective_lr + group, tau * ratio * rho, mask=mask)
    tl.store(decay + group, tl.where(ok, a, 0.0), mask=mask)
    tl.store(good, ok)
