"""The scalar side of MoMo: the averaged loss, the drift of its model, the lower bound and the step size.

Everything here is arithmetic on 0-dim tensors and on vectors with one entry per parameter group: no parameters,
no devices, no Python branch on a value. Symbols beside the code (`f̄`, `c`, `ρ`, `τ`, ...) are those of the paper
(Schaipp et al., ICML 2024, arXiv 2305.07583).

One identity is not in the paper. With `d` the momentum and `γ` the average of `<g_j, x_j>`, the model needs
`c_k = <d_k, x_k> - γ_k`. The terms `<g_k, x_k>` cancel in it, so that

    c_1 = 0,    c_k = β (c_{k-1} + <d_{k-1}, x_k - x_{k-1}>)

and the last inner product is known from the previous step, as far as the parameters did what it said (`movement`). `γ` is never computed, the parameters are not read to
find the step size (unless weight decay asks for it), and no two large inner products are subtracted.
"""

import math
from typing import NamedTuple

from torch import Tensor, cat, finfo, full_like, stack, where


class ModelState(NamedTuple):
    """What the model remembers between steps; every entry is a 0-dim tensor of at least float32.

    Attributes:
        step: number k of steps taken.
        loss_avg: f̄, the averaged loss.
        drift: c_k + <d_k, x_{k+1} - x_k>, which becomes c_{k+1} when multiplied by β.
        fstar: f*, the lower bound in use.
        polyak_lr: what τρ of the last step would have been without the cap; comparable with the lr of Adam or SGD.
        capped: number of steps on which the cap `lr` decided.
        skipped: number of steps dropped because the loss, its clip factor or a gradient was not finite.
        stalled: number of steps whose model lay at or below f*, so that the step was 0.
        raw_loss_avg: the losses averaged like f̄, but as they were given: not scaled with clipped gradients. For the logs.
    """

    step: Tensor
    loss_avg: Tensor
    drift: Tensor
    fstar: Tensor
    polyak_lr: Tensor
    capped: Tensor
    skipped: Tensor
    stalled: Tensor
    raw_loss_avg: Tensor


class Step(NamedTuple):
    """One step along u: `x_g <- (x_g - factor_g u_g) / (1 + a_g)`, or its AdamW form where `divide=False`.

    Attributes:
        factor: τ r_g per group, shape (groups,); 0 on a skipped step.
        effective_lr: τ r_g ρ per group, shape (groups,), comparable with the lr of Adam or SGD.
        decay: a_g = α_g λ_g per group, shape (groups,); 0 on a skipped step.
        ok: 0-dim bool, False where nothing may be changed.
    """

    factor: Tensor
    effective_lr: Tensor
    decay: Tensor
    ok: Tensor


def debias(beta: float, step: Tensor) -> Tensor:
    """1 - β^k, through expm1 because in float32 the plain formula loses five digits on the first steps of β = 0.999."""
    return -(step * (math.log(beta) if beta > 0 else -math.inf)).expm1()


def average_weight(step: Tensor, beta: float, bias_correction: bool) -> Tensor:
    """The weight of step k's sample in both averages, d and f̄: 1-β, or 1 on the first step without bias correction."""
    weight = full_like(step, 1.0 - beta)
    return weight if bias_correction else where(step == 1, 1.0, weight)


def clip_gap(loss: Tensor, clip_factor: Tensor | None, fstar: Tensor) -> Tensor:
    """The loss to feed for gradients that were scaled by κ: f* + κ (f - f*), so that the model stays a lower one."""
    return loss if clip_factor is None else fstar + clip_factor * (loss - fstar)


def acceptable(
    loss: Tensor, lr: Tensor, weight_decay: Tensor, clip_factor: Tensor | None, norm: Tensor | None = None
) -> Tensor:
    """Whether a step can be taken with what it is given, as far as that is known before the gradients are read; 0-dim.

    `norm` is not finite where the gradients are not, or None where nobody has looked.
    """
    numbers = [value.view(1) for value in (loss, clip_factor, norm) if value is not None]
    ok = all_finite(cat([*numbers, lr, weight_decay])) & (lr.min() >= 0)
    return ok if clip_factor is None else ok & (clip_factor >= 0)


def all_finite(numbers: Tensor) -> Tensor:
    """Whether no number is infinite or NaN, 0-dim; only of these a difference to itself is not 0."""
    return (numbers - numbers).any().logical_not()


def with_drift(state: ModelState, moved: Tensor | None) -> ModelState:
    """The state with <d, what the parameters did> added, unless that is None or not finite, so that nothing is known."""
    return state if moved is None else state._replace(drift=state.drift + moved.nan_to_num(0.0, 0.0, 0.0))


def next_step(
    state: ModelState,
    loss: Tensor,
    dual_norm_sq: Tensor,
    overlap: Tensor,
    grad_norm_sq: Tensor,
    strayed: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    usable: Tensor,
    *,
    lb: float,
    beta: float,
    bias_correction: bool,
    use_fstar: bool,
    divide: bool,
    clip_factor: Tensor | None = None,
) -> tuple[ModelState, Step]:
    """Minimise the truncated model: from the loss and the inner products of step k to the step size.

    Args:
        state: the state after step k-1.
        loss: f_k, 0-dim; the scalar whose gradient the momentum took in.
        dual_norm_sq: n_g = <d_g, u_g>, shape (groups,).
        overlap: s_g = <d_g, x_g>, shape (groups,); only groups with decay count.
        grad_norm_sq: |g_g|², shape (groups,), to see whether every gradient is finite and small enough to be squared; 0
            where that is known.
        strayed: <d_{k-1}, x_k - x>, 0-dim, where x_k is what the parameters are and x what the last step made of them in
            exact arithmetic. It is taken in on a skipped step too; where it is not finite nothing is known, and it is
            left out.
        lr: α_g, shape (groups,).
        weight_decay: λ_g, shape (groups,).
        usable: False, 0-dim, where it is known already that the step is to be dropped, see `acceptable`.
        lb: the user's lower bound; f* never falls below it.
        beta: β of both averages.
        bias_correction: whether ρ_k = 1-β^k (averages start at 0) or 1 (they start at the first sample).
        use_fstar: whether f* is estimated online, by the paper's rule (section 4).
        divide: whether the decay is proximal, `/ (1 + a)`, or AdamW's, `(1 - a) x`.
        clip_factor: κ, by which the gradients were scaled before they were seen here, or None.

    Returns:
        The state after step k and the step to take. Where the loss or an inner product is not finite, the state is
        the old one (apart from `skipped`) and the step is empty.
    """
    state = with_drift(state, strayed)
    cap = lr.max()  # α
    zero = cap.new_zeros(())
    ratio = where(cap > 0, lr / cap, zero)  # r_g
    decay = lr * weight_decay  # a_g
    step = state.step + 1  # k
    rho = debias(beta, step) if bias_correction else 1.0  # ρ_k
    fstar = state.fstar if use_fstar else state.fstar.new_full((), lb)

    weight = average_weight(step, beta, bias_correction)
    fed = clip_gap(loss, clip_factor, fstar)
    loss_avg = state.loss_avg.lerp(fed, weight)  # f̄_k
    drift = (1.0 - weight) * state.drift  # c_k

    shrunk = (overlap * decay / (1 + decay)).sum()
    value = loss_avg + drift - shrunk  # A
    shorter = ratio / (1 + decay)
    slope = (shorter * dual_norm_sq).sum()  # B, which is also -<d_k, x_{k+1} - x_k> / τ, apart from the decay
    if use_fstar:
        fstar = where(value < rho * fstar, (value / (2 * rho)).clamp(min=lb), fstar)
    bound = cap / rho
    gap = (value - rho * fstar).clamp(min=0)
    moves = slope > 0
    polyak = where(moves, gap / slope, zero).clamp(max=finfo(gap.dtype).max)
    tau = where(moves, polyak.minimum(bound), zero)  # τ

    inner = (tau * ratio * dual_norm_sq).sum()
    if use_fstar:
        fstar = ((loss_avg + drift - inner / 2) / rho).clamp(min=lb)
    if divide:  # <d_k, x_{k+1} - x_k>
        moved = -(tau * slope + shrunk)
    else:
        moved = -(inner + (overlap * decay).sum())

    new = ModelState(
        step=step,
        loss_avg=loss_avg,
        drift=drift + moved,
        fstar=fstar,
        polyak_lr=polyak * rho,
        capped=state.capped + (moves & (bound <= polyak)),
        skipped=state.skipped,
        stalled=state.stalled + (moves & (gap == 0)),
        raw_loss_avg=state.raw_loss_avg.lerp(loss, weight),
    )
    # Everything that is going to be written, and what a comparison or a maximum on the way may have swallowed.
    numbers = stack([*new, tau, decay.sum(), fed, dual_norm_sq.sum(), overlap.sum(), slope, grad_norm_sq.sum()])
    ok = all_finite(numbers) & usable
    old = stack(state)
    kept = ModelState(*where(ok, numbers.narrow(0, 0, len(new)), old).to(old.dtype).unbind())
    kept = kept._replace(skipped=state.skipped + ok.logical_not())
    factor = tau * ratio
    return kept, Step(where(ok, factor, zero), factor * rho, where(ok, decay, zero), ok)
