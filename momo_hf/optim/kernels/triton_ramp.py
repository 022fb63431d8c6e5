"""The two passes of `Ramp` over many tensors in one launch each, in Triton."""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import flag
from momo_hf.optim.kernels.triton_tensors import (
    AVERAGE,
    GRAD,
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


ORIGIN = OTHER


@triton.jit
def first_pass(
    places,
    blocks,
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
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """<g_k, u_{k-1}>, <d̂_k, u_k> and <g_k, D_k^{-1} g_k>; d and v are written where it is known that they may."""
    row, k = tl.program_id(0), tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    d = read(place, AVERAGE, offsets, mask, tl.float32, aligned)
    v = second_moment(place, offsets, mask, g, adam, aligned)
    correction = rsqrt_correction(k - 1, log_beta2, adam)
    slope = tl.sum(g * direction(corrected(d, k - 1, log_beta, corrects), v, mask, correction, eps, adam))

    d += tl.load(weight) * (g - d)
    v = take_in(v, g, beta2, adam)
    if finite_known:
        written = offsets < size * tl.load(inputs_valid).to(tl.int64)
        write(place, AVERAGE, offsets, written, d, tl.float32, aligned)
        if adam:
            write(place, SECOND, offsets, written, v, tl.float32, aligned)
    d = corrected(d, k, log_beta, corrects)
    correction = rsqrt_correction(k, log_beta2, adam)
    tl.store(sums + row * 3, slope)
    tl.store(sums + row * 3 + 1, tl.sum(d * direction(d, v, mask, correction, eps, adam)))
    tl.store(sums + row * 3 + 2, tl.sum(g * direction(g, v, mask, correction, eps, adam)))


@triton.jit
def second_pass(
    places,
    blocks,
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
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """x - α u, or x as at the origin and d and v at 0; the origin at the first step, and d and v if the first pass has not
    written them.
    """
    k = tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    goes, returns, first = flag(ok), flag(back), flag(begins)
    d = read(place, AVERAGE, offsets, mask, tl.float32, aligned)
    v = second_moment(place, offsets, mask, d, adam, aligned)
    averaged = offsets < size * returns.to(tl.int64)
    if not finite_known:
        averaged = offsets < size * (goes | returns).to(tl.int64)
        g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
        d += tl.load(weight) * (g - d)
        v = take_in(v, g, beta2, adam)
    u = direction(corrected(d, k, log_beta, corrects), v, mask, rsqrt_correction(k, log_beta2, adam), eps, adam)
    write(place, AVERAGE, offsets, averaged, tl.where(returns, 0.0, d), tl.float32, aligned)
    if adam:
        write(place, SECOND, offsets, averaged, tl.where(returns, 0.0, v), tl.float32, aligned)

    x = read(place, PARAM, offsets, mask, param_dtype, aligned)
    write(place, ORIGIN, offsets, offsets < size * first.to(tl.int64), x, tl.float32, aligned)
    leaves = offsets < size * (returns & (first == 0)).to(tl.int64)
    origin = tl.where(first, x, read(place, ORIGIN, offsets, leaves, tl.float32, aligned))
    x = tl.where(returns, origin, x - tl.load(length) * u)
    write(place, PARAM, offsets, offsets < size * (goes | returns).to(tl.int64), x, param_dtype, aligned)
