"""The scalar side of the paper's step: the averaged loss, the drift of its model, the lower bound and the step size.

Everything here is arithmetic on scalars and on vectors with one entry per parameter group, in tensors or in Python's numbers
(see `arithmetic`): no parameters, no devices, no Python branch on a value. Symbols beside the code (`f̄`, `c`, `ρ`, `τ`, ...)
are those of the paper (Schaipp et al., ICML 2024, arXiv 2305.07583).

One identity is not in the paper. With `d` the momentum and `γ` the average of `<g_j, x_j>`, the model needs
`c_k = <d_k, x_k> - γ_k`. The terms `<g_k, x_k>` cancel in it, so that

    c_1 = 0,    c_k = β (c_{k-1} + <d_{k-1}, x_k - x_{k-1}>)

and the last inner product is known from the previous step, as far as the parameters did what it said (`movement`). `γ` is
never computed, the parameters are not read to find the step size (unless weight decay asks for it), and no two large inner
products are subtracted.

The averages start at 0, so that they are too small by ρ = 1-β^k at first. The state has them as they are; the step is made of
the corrected ones, d̂ = d/ρ, f̂ = f̄/ρ, ĉ = c/ρ, along u = direction(d̂):

    τ = min(α, (f̂ + ĉ - f*)_+ / <d̂, u>)

For a direction that is linear in d this is the paper's step, whose τ is τ/ρ here; for any other it is the only right form.
"""

import math
from typing import NamedTuple

from torch import Tensor

from momo_hf.optim.steps.arithmetic import (
    all_finite,
    divided,
    expm1,
    full_like,
    largest,
    lerp,
    maximum,
    minimum,
    or_else,
    plus,
    quotient,
    transaction,
    where,
)
from momo_hf.optim.steps.given import Given, Settings


class ModelState(NamedTuple):
    """What the model remembers between steps; every entry is a 0-dim tensor of at least float32.

    Attributes:
        step: number k of steps taken.
        loss_avg: f̄, the averaged loss.
        drift: c_k + <d_k, x_{k+1} - x_k>, which becomes c_{k+1} when multiplied by β.
        fstar: f*, the lower bound in use.
        polyak_lr: what τ of the last step would have been without the cap; comparable with the lr of Adam or SGD.
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


class Sums(NamedTuple):
    """Inner products over all parameters, per group, shape (groups,).

    Attributes:
        dual_norm_sq: <d_g, u_g>, which is ρ n_g.
        overlap: <d_g, x_g>, which is ρ s_g; only groups with decay count.
        grad_norm_sq: |g_g|², to see whether every gradient is finite and small enough to be squared; 0 where that is known.
    """

    dual_norm_sq: Tensor
    overlap: Tensor
    grad_norm_sq: Tensor


class Step(NamedTuple):
    """One step along u: `x_g <- (x_g - factor_g u_g) / (1 + a_g)`, or its AdamW form where `divide=False`.

    Attributes:
        factor: τ r_g per group, shape (groups,), the lr that Adam or SGD would have; 0 on a skipped step.
        decay: a_g = α_g λ_g per group, shape (groups,); 0 on a skipped step.
        accepted: 0-dim bool, False where nothing may be changed.
    """

    factor: Tensor
    decay: Tensor
    accepted: Tensor


def debias(beta: float, step: Tensor) -> Tensor:
    """1 - β^k, through expm1 because in float32 the plain formula loses five digits on the first steps of β = 0.999."""
    return -expm1(step * (math.log(beta) if beta > 0 else -math.inf))


def average_weight(step: Tensor, beta: float, bias_correction: bool) -> Tensor:
    """The weight of step k's sample in both averages, d and f̄: 1-β, or 1 on the first step without bias correction."""
    weight = full_like(step, 1.0 - beta)
    return weight if bias_correction else where(step == 1, 1.0, weight)


def clip_gap(loss: Tensor, clip_factor: Tensor | None, fstar: Tensor) -> Tensor:
    """The loss to feed for gradients that were scaled by κ: f* + κ (f - f*), so that the model stays a lower one."""
    return loss if clip_factor is None else fstar + clip_factor * (loss - fstar)


def acceptable(given: Given, norm: Tensor | None = None) -> Tensor:
    """Whether a step can be taken with what it is given, as far as that is known before the gradients are read; 0-dim.

    `norm` is not finite where the gradients are not, or None where nobody has looked.
    """
    clip_factor = given.clip_factor
    numbers = (value for value in (given.loss, clip_factor, norm) if value is not None)
    ok = all_finite([*numbers, given.lr, given.weight_decay]) & (given.lr.min() >= 0)
    return ok if clip_factor is None else ok & (clip_factor >= 0)


def with_drift(state: ModelState, moved: Tensor | None) -> ModelState:
    """The state with <d, what the parameters did> added, unless that is None or not finite, so that nothing is known."""
    return state if moved is None else state._replace(drift=plus(state.drift, or_else(moved, 0.0)))


def next_step(
    state: ModelState, given: Given, sums: Sums, strayed: Tensor, inputs_valid: Tensor, settings: Settings
) -> tuple[ModelState, Step]:
    """Minimise the truncated model: from the loss and the inner products of step k to the step size.

    Args:
        state: the state after step k-1.
        given: the loss f_k, whose gradient the momentum took in, and what else the step is given.
        sums: the inner products.
        strayed: <d_{k-1}, x_k - x>, 0-dim, where x_k is what the parameters are and x what the last step made of them in
            exact arithmetic. It is taken in on a skipped step too; where it is not finite nothing is known, and it is
            left out.
        inputs_valid: False, 0-dim, where it is known already that the step is to be dropped, see `acceptable`.
        settings: the shared options.

    Returns:
        The state after step k and the step to take. Where the loss or an inner product is not finite, the state is
        the old one (apart from `skipped`) and the step is empty.
    """
    loss, lr, (lb, beta, bias_correction, use_fstar, divide) = given.loss, given.lr, settings
    state = with_drift(state, strayed)
    cap = lr.max()  # α
    ratio = quotient(lr, cap, 0.0)  # r_g
    decay = lr * given.weight_decay  # a_g
    step = state.step + 1  # k
    rho = debias(beta, step) if bias_correction else 1.0  # ρ_k
    fstar = state.fstar if use_fstar else full_like(state.fstar, lb)

    weight = average_weight(step, beta, bias_correction)
    fed = clip_gap(loss, given.clip_factor, fstar)
    loss_avg = lerp(state.loss_avg, fed, weight)  # f̄_k
    drift = (1.0 - weight) * state.drift  # c_k
    dual_norm, overlap = sums.dual_norm_sq / rho, sums.overlap / rho  # n_g, s_g, of d̂
    height = divided(loss_avg + drift, rho)  # f̂ + ĉ

    shrunk = (overlap * decay / (1 + decay)).sum()
    value = height - shrunk  # A
    slope = (ratio / (1 + decay) * dual_norm).sum()  # B, which is also -<d̂_k, x_{k+1} - x_k> / τ, apart from the decay
    if use_fstar:
        fstar = where(value < fstar, maximum(value / 2, lb), fstar)
    gap = maximum(value - fstar, 0.0)
    moves = slope > 0
    polyak = minimum(quotient(gap, slope, 0.0), largest(gap))
    tau = where(moves, minimum(polyak, cap), 0.0)  # τ

    inner = (tau * ratio * dual_norm).sum()
    if use_fstar:
        fstar = maximum(height - inner / 2, lb)
    if divide:  # <d̂_k, x_{k+1} - x_k>
        moved = -(tau * slope + shrunk)
    else:
        moved = -(inner + (overlap * decay).sum())

    new = ModelState(
        step=step,
        loss_avg=loss_avg,
        drift=drift + rho * moved,
        fstar=fstar,
        polyak_lr=polyak,
        capped=state.capped + (moves & (cap <= polyak)),
        skipped=state.skipped,
        stalled=state.stalled + (moves & (gap == 0)),
        raw_loss_avg=lerp(state.raw_loss_avg, loss, weight),
    )
    # Everything that is going to be written, and what a comparison or a maximum on the way may have swallowed.
    others = [tau, decay.sum(), fed, dual_norm.sum(), overlap.sum(), slope, sums.grad_norm_sq.sum()]
    numbers, ok = transaction(new, state, others, inputs_valid)
    kept = ModelState(*numbers)._replace(skipped=where(ok, state.skipped, state.skipped + 1))
    return kept, Step(where(ok, tau * ratio, 0.0), where(ok, decay, 0.0), ok)
