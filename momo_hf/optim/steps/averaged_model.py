"""The scalar side of iterate averaging: the averaged gap, its slope, the step size and the weight of an iterate.

Schedule-free learning (Defazio et al., NeurIPS 2024, arXiv 2405.15682) with a Polyak step (Gower, Loizou, 2025,
arXiv 2511.07767). Three sequences start at one point: z takes the steps, x is the average of the z, and the gradient is
taken between them:

    y = (1-β) z + β x
    τ = min(α, p avg[f(y) - f* + <g, z - y>]_+ / avg<g, D^{-1} g>)
    z <- z - τ D^{-1} g,    x <- x + (w / Σ w) (z - x),    w = k^r (largest τ so far)²

As in `model` everything is arithmetic on scalars and on vectors with an entry per parameter group, or two, without a Python
branch on a value. Both averages start at 0 and have the weight 1-β, so that their quotient needs no correction.
"""

from typing import NamedTuple

from torch import Tensor

from momo_hf.optim.steps.arithmetic import full_like, largest, lerp, maximum, minimum, quotient, transaction, where
from momo_hf.optim.steps.given import Given, Settings
from momo_hf.optim.steps.model import ModelState, average_weight, clip_gap


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


class AveragedStep(NamedTuple):
    """One step of z along u = D^{-1} g, and of x towards z.

    Attributes:
        factor: τ r_g, shaped as `Given.lr`; 0 on a skipped step.
        decay: a_g = α_g λ_g, likewise; 0 on a skipped step.
        weight: w / Σ w, 0-dim, the weight of the new z in x; 0 on a skipped step.
        accepted: 0-dim bool, False where nothing may be changed.
    """

    factor: Tensor
    decay: Tensor
    weight: Tensor
    accepted: Tensor


class AveragedSums(NamedTuple):
    """Inner products over all parameters, shaped as `Given.lr`.

    Attributes:
        norm_sq: <g_g, u_g>.
        ahead: <g_g, z_g - y_g>.
        overlap: <g_g, z_g>; only groups with proximal decay count.
        written: anything that is finite only where everything is that is going to be written.
    """

    norm_sq: Tensor
    ahead: Tensor
    overlap: Tensor
    written: Tensor


def next_averaged_step(
    model: ModelState,
    state: AverageState,
    given: Given,
    sums: AveragedSums,
    inputs_valid: Tensor,
    settings: Settings,
    *,
    power: int,
    polyak: float,
) -> tuple[ModelState, AverageState, AveragedStep]:
    """From the loss and the inner products of step k to the step size and the weight of the new iterate.

    Args:
        model: counters and logs after step k-1.
        state: the averages after step k-1.
        given: the loss f(y), and what else the step is given.
        sums: the inner products.
        inputs_valid: False, 0-dim, where it is known already that the step is to be dropped, see `acceptable`.
        settings: the shared options. The decay is proximal with `divide`, z <- (z - τ r u) / (1 + a), the minimiser of the
            truncated model with decay; or at y, z <- z - τ r u - a y, as in schedule-free AdamW. `bias_correction` is for
            the loss in the logs alone.
        power: r.
        polyak: p.

    Returns:
        Both states after step k and the step to take. Where the loss or an inner product is not finite, the states are
        the old ones (apart from `skipped`) and the step is empty.
    """
    loss, lr, beta = given.loss, given.lr, settings.beta
    cap = lr.max()  # α
    ratio = quotient(lr, cap, 1.0)  # r_g; where a warmup starts at 0, the slope is averaged as the gap is
    decay = lr * given.weight_decay  # a_g
    shrinks = decay / (1 + decay) if settings.divide else 0.0
    step = model.step + 1  # k
    fstar = full_like(model.fstar, settings.lb)

    fed = clip_gap(loss, given.clip_factor, fstar)
    gap = maximum(fed - fstar + sums.ahead.sum() - (shrinks * sums.overlap).sum(), 0.0)
    gap_avg = lerp(state.gap_avg, gap, 1 - beta)
    norm = (ratio * (1 - shrinks) * sums.norm_sq).sum()
    norm_avg = lerp(state.norm_avg, norm, 1 - beta)
    moves = norm_avg > 0
    reach = minimum(quotient(polyak * gap_avg, norm_avg, 0.0), largest(gap))
    tau = where(moves, minimum(reach, cap), 0.0)  # τ
    tau_max = maximum(state.tau_max, tau)
    weight = step**power * (tau_max * tau_max)  # w; the first iterates are far from where the last ones are
    weight_sum = state.weight_sum + weight
    fraction = quotient(weight, weight_sum, 0.0)

    new_model = model._replace(
        step=step,
        fstar=fstar,
        polyak_lr=reach,
        capped=model.capped + (moves & (cap <= reach)),
        stalled=model.stalled + ((gap == 0) & (loss <= fstar)),
        raw_loss_avg=lerp(model.raw_loss_avg, loss, average_weight(step, beta, settings.bias_correction)),
    )
    new_state = AverageState(gap_avg, norm_avg, tau_max, weight_sum)
    # Everything that is going to be written, and what a comparison or a maximum on the way may have swallowed.
    others = [tau, decay.sum(), fed, norm, *(values.sum() for values in sums)]
    numbers, ok = transaction([*new_model, *new_state], [*model, *state], others, inputs_valid)
    kept_model = ModelState(*numbers[: len(model)])
    return (
        kept_model._replace(skipped=where(ok, model.skipped, model.skipped + 1)),
        AverageState(*numbers[len(model) :]),
        AveragedStep(where(ok, tau * ratio, 0.0), where(ok, decay, 0.0), where(ok, fraction, 0.0), ok),
    )
