"""The scalar side of iterate averaging: the averaged gap, its slope, the step size and the weight of an iterate.

Schedule-free learning (Defazio et al., NeurIPS 2024, arXiv 2405.15682) with a Polyak step (Gower, Loizou, 2025,
arXiv 2511.07767). Three sequences start at one point: z takes the steps, x is the average of the z, and the gradient is
taken between them:

    y = (1-β) z + β x
    τ = min(α, avg[f(y) - f* + <g, z - y>]_+ / avg<g, D^{-1} g>)
    z <- z - τ D^{-1} g,    x <- x + c (z - x),    c = w / Σ w,    w = k (largest τ so far)²

As in `model` everything is arithmetic on 0-dim tensors and on vectors with one entry per parameter group, without a
Python branch on a value. Both averages start at 0 and have the weight 1-β, so that their quotient needs no correction.
"""

from typing import NamedTuple

from torch import Tensor, finfo, stack, where

from momo_hf.optim.model import ModelState, average_weight, clip_gap


class AverageState(NamedTuple):
    """What averaging remembers between steps, beside the steps, counters and logs of `ModelState`; 0-dim tensors.

    Attributes:
        gap_avg: average of [f(y) - f* + <g, z - y>]_+.
        norm_avg: average of <g, D^{-1} g>.
        tau_max: the largest τ so far.
        weight_sum: Σ w.
    """

    gap_avg: Tensor
    norm_avg: Tensor
    tau_max: Tensor
    weight_sum: Tensor


class Sums(NamedTuple):
    """Inner products over all parameters, per group, shape (groups,).

    Attributes:
        norm_sq: <g, D^{-1} g>.
        ahead: <g, z - y>.
        overlap: <g, z>; only groups with proximal decay count.
        written: anything that is finite only where all new buffers are.
    """

    norm_sq: Tensor
    ahead: Tensor
    overlap: Tensor
    written: Tensor


class AveragedStep(NamedTuple):
    """One step of z along u = D^{-1} g, and of x towards z.

    Attributes:
        factor: τ r_g per group, shape (groups,); 0 on a skipped step.
        effective_lr: the same, for the logs.
        decay: a_g = α_g λ_g per group, shape (groups,); 0 on a skipped step.
        share: c, 0-dim; 0 on a skipped step.
        ok: 0-dim bool, False where nothing may be changed.
    """

    factor: Tensor
    effective_lr: Tensor
    decay: Tensor
    share: Tensor
    ok: Tensor


def next_averaged_step(
    model: ModelState,
    state: AverageState,
    loss: Tensor,
    sums: Sums,
    lr: Tensor,
    weight_decay: Tensor,
    *,
    lb: float,
    beta: float,
    bias_correction: bool,
    divide: bool,
    clip_factor: Tensor | None = None,
) -> tuple[ModelState, AverageState, AveragedStep]:
    """From the loss and the inner products of step k to the step size and the weight of the new iterate.

    Args:
        model: counters and logs after step k-1.
        state: the averages after step k-1.
        loss: f(y), 0-dim.
        sums: over all shards.
        lr: α_g, shape (groups,).
        weight_decay: λ_g, shape (groups,).
        lb: f*, the lower bound of the loss.
        beta: β of both averages.
        bias_correction: as in `model`; here for the loss in the logs alone.
        divide: whether the decay is proximal, z <- (z - τ r u) / (1 + a), the minimiser of the truncated model with
            decay; or at y, z <- z - τ r u - a y, as in schedule-free AdamW.
        clip_factor: κ, by which the gradients were scaled before they were seen here, or None.

    Returns:
        Both states after step k and the step to take. Where the loss or an inner product is not finite, the states are
        the old ones (apart from `skipped`) and the step is empty.
    """
    cap = lr.max()  # α
    zero = cap.new_zeros(())
    ratio = where(cap > 0, lr / cap, 1.0)  # r_g; where a warmup starts at 0, the slope is averaged as the gap is
    decay = lr * weight_decay  # a_g
    shrinks = decay / (1 + decay) if divide else zero
    step = model.step + 1  # k
    fstar = model.fstar.new_full((), lb)

    fed = clip_gap(loss, clip_factor, fstar)
    gap = (fed - fstar + sums.ahead.sum() - (shrinks * sums.overlap).sum()).clamp(min=0)
    gap_avg = state.gap_avg.lerp(gap, 1 - beta)
    norm = (ratio * (1 - shrinks) * sums.norm_sq).sum()
    norm_avg = state.norm_avg.lerp(norm, 1 - beta)
    moves = norm_avg > 0
    polyak = where(moves, gap_avg / norm_avg, zero).clamp(max=finfo(gap.dtype).max)
    tau = where(moves, polyak.minimum(cap), zero)  # τ
    tau_max = state.tau_max.maximum(tau)
    weight = step * tau_max.square()  # w; the first iterates are far from where the last ones are
    weight_sum = state.weight_sum + weight
    share = where(weight_sum > 0, weight / weight_sum, zero)  # c

    new_model = model._replace(
        step=step,
        fstar=fstar,
        polyak_lr=polyak,
        capped=model.capped + (moves & (cap <= polyak)),
        stalled=model.stalled + ((gap == 0) & (loss <= fstar)),
        raw_loss_avg=model.raw_loss_avg.lerp(loss, average_weight(step, beta, bias_correction)),
    )
    new_state = AverageState(gap_avg, norm_avg, tau_max, weight_sum)
    # Everything that is going to be written, and what a comparison or a maximum on the way may have swallowed.
    sources = [tau, cap, decay.sum(), loss, fed, norm, *(values.sum() for values in sums)]
    numbers = stack([*new_model, *new_state, *sources])
    ok = numbers.isfinite().all() & (lr.min() >= 0)
    if clip_factor is not None:
        ok = ok & (clip_factor >= 0)
    old = stack([*model, *state])
    kept = where(ok, numbers[: len(old)], old).unbind()
    kept_model = ModelState(*kept[: len(model)])
    factor = where(ok, tau * ratio, zero)
    return (
        kept_model._replace(skipped=model.skipped + ~ok),
        AverageState(*kept[len(model) :]),
        AveragedStep(factor, factor, where(ok, decay, zero), where(ok, share, zero), ok),
    )
