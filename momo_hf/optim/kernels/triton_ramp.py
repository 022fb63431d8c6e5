"""The two passes of `Ramp` over many tensors in one launch each, in Triton."""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import flag
from momo_hf.optim.kernels.triton_tensors import (
    ANOTHER,
    GRAD,
    MOMENTUM,
    OTHER,
    PARAM,
    SECOND,
    corrected,
    direction,
    find,
    read,
    rsqrt_correction,
    second_moment,
    take_in,
    write,
)


ORIGIN, LAST = OTHER, ANOTHER


@triton.jit
def first_pass(
    places,
    blocks,
    directions,
    sums,
    step,
    weight,
    inputs_valid,
    grad_dtype: tl.constexpr,
    log_beta: tl.constexpr,
    corrects: tl.constexpr,
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """<g_k, u_{k-1}>, <d̂_k, u_k> and, but for a costly method, <g_k, D_k^{-1} g_k>; d and v are written where it is known
    that they may.
    """
    row, k = tl.program_id(0), tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    d = read(place, MOMENTUM, offsets, mask, tl.float32, aligned)
    v = second_moment(place, directions, offsets, mask, g, adam, costly, aligned)
    correction = rsqrt_correction(k - 1, log_beta2, adam)
    if costly:
        before = read(place, LAST, offsets, mask, tl.float32, aligned)
    else:
        before = direction(corrected(d, k - 1, log_beta, corrects), v, mask, correction, eps, adam, costly)
    slope = tl.sum(g * before)

    d += tl.load(weight) * (g - d)
    v = take_in(v, g, beta2, adam)
    if finite_known:
        written = offsets < size * tl.load(inputs_valid).to(tl.int64)
        write(place, MOMENTUM, offsets, written, d, tl.float32, aligned)
        if adam:
            write(place, SECOND, offsets, written, v, tl.float32, aligned)
    d = corrected(d, k, log_beta, corrects)
    correction = rsqrt_correction(k, log_beta2, adam)
    tl.store(sums + row * 3, slope)
    tl.store(sums + row * 3 + 1, tl.sum(d * direction(d, v, mask, correction, eps, adam, costly)))
    sample = 0.0
    if not costly:
        sample = tl.sum(g * direction(g, v, mask, correction, eps, adam, costly))
    tl.store(sums + row * 3 + 2, sample)


@triton.jit
def second_pass(
    places,
    blocks,
    directions,
    step,
    weight,
    length,
    ok,
    back,
    begins,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    log_beta: tl.constexpr,
    corrects: tl.constexpr,
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """x - α u, or x as at the origin and d and v at 0; the origin at the first step, d and v if the first pass has not
    written them, and the direction of a costly method.
    """
    k = tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    goes, returns, first = flag(ok), flag(back), flag(begins)
    d = read(place, MOMENTUM, offsets, mask, tl.float32, aligned)
    v = second_moment(place, directions, offsets, mask, d, adam, costly, aligned)
    averaged = offsets < size * returns.to(tl.int64)
    moves = offsets < size * (goes | returns).to(tl.int64)
    if not finite_known:
        averaged = moves
        g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
        d += tl.load(weight) * (g - d)
        v = take_in(v, g, beta2, adam)
    u = direction(
        corrected(d, k, log_beta, corrects), v, mask, rsqrt_correction(k, log_beta2, adam), eps, adam, costly
    )
    write(place, MOMENTUM, offsets, averaged, tl.where(returns, 0.0, d), tl.float32, aligned)
    if adam:
        write(place, SECOND, offsets, averaged, tl.where(returns, 0.0, v), tl.float32, aligned)
    if costly:
        write(place, LAST, offsets, moves, tl.where(returns, 0.0, u), tl.float32, aligned)

    x = read(place, PARAM, offsets, mask, param_dtype, aligned)
    write(place, ORIGIN, offsets, offsets < size * first.to(tl.int64), x, tl.float32, aligned)
    leaves = offsets < size * (returns & (first == 0)).to(tl.int64)
    origin = tl.where(first, x, read(place, ORIGIN, offsets, leaves, tl.float32, aligned))
    x = tl.where(returns, origin, x - tl.load(length) * u)
    write(place, PARAM, offsets, moves, x, param_dtype, aligned)
