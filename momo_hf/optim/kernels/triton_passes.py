"""The two passes of `Modelled` over many tensors in one launch each, in Triton; imported where they are used, because Triton
is optional.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_tensors import (
    GRAD,
    MOMENTUM,
    PARAM,
    SECOND,
    corrected,
    direction,
    find,
    momentum,
    read,
    rsqrt_correction,
    second_moment,
    take_in,
    write,
)


@triton.jit
def first_pass(
    places,
    blocks,
    directions,
    sums,
    step,
    weight,
    inputs_valid,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    log_beta: tl.constexpr,
    corrects: tl.constexpr,
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    decays: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """<d, u>, <d, x> where the bucket decays and |g|² where it is not known to be finite; otherwise d and v are written."""
    row, k = tl.program_id(0), tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    d = momentum(place, offsets, mask, g, weight, aligned)
    v = take_in(second_moment(place, directions, offsets, mask, d, adam, costly, aligned), g, beta2, adam)
    overlap = 0.0
    norm = 0.0
    if finite_known:
        written = offsets < size * tl.load(inputs_valid).to(tl.int64)
        write(place, MOMENTUM, offsets, written, d, tl.float32, aligned)
        if adam:
            write(place, SECOND, offsets, written, v, tl.float32, aligned)
    else:
        norm = tl.sum(g * g)
    if decays:
        overlap = tl.sum(d * read(place, PARAM, offsets, mask, param_dtype, aligned))
    correction = rsqrt_correction(k, log_beta2, adam)
    u = direction(corrected(d, k, log_beta, corrects), v, mask, correction, eps, adam, costly)
    tl.store(sums + row * 3, tl.sum(d * u))
    tl.store(sums + row * 3 + 1, overlap)
    tl.store(sums + row * 3 + 2, norm)


# Numbers of several groups stand side by side in memory; the place of one must not make another kernel of it.
@triton.jit(do_not_specialize_on_alignment=["factor", "decay"])
def second_pass(
    places,
    blocks,
    directions,
    sums,
    step,
    weight,
    factor,
    decay,
    ok,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    log_beta: tl.constexpr,
    corrects: tl.constexpr,
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    decays: tl.constexpr,
    divide: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """x, and d and v if the first pass has not written them; <d, x> afterwards and <d, rounding>."""
    row, k = tl.program_id(0), tl.load(step)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    written = offsets < size * tl.load(ok).to(tl.int64)
    d = read(place, MOMENTUM, offsets, mask, tl.float32, aligned)
    v = second_moment(place, directions, offsets, mask, d, adam, costly, aligned)
    if not finite_known:
        g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
        new = d + tl.load(weight) * (g - d)
        v = take_in(v, g, beta2, adam)
        write(place, MOMENTUM, offsets, written, new, tl.float32, aligned)
        if adam:
            write(place, SECOND, offsets, written, v, tl.float32, aligned)
        d = tl.where(written, new, d)
    x = read(place, PARAM, offsets, mask, param_dtype, aligned)
    new = x
    if decays and not divide:
        new *= 1 - tl.load(decay)
    correction = rsqrt_correction(k, log_beta2, adam)
    new -= tl.load(factor) * direction(corrected(d, k, log_beta, corrects), v, mask, correction, eps, adam, costly)
    if decays and divide:
        new /= 1 + tl.load(decay)
    new = tl.where(written, new, x)
    rounded = new.to(param_dtype).to(tl.float32)
    write(place, PARAM, offsets, written, rounded, param_dtype, aligned)
    tl.store(sums + row * 2, tl.sum(d * rounded))
    tl.store(sums + row * 2 + 1, tl.sum(d * (rounded - new)))
