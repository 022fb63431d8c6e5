"""The two passes of `Averaged` over many tensors in one launch each, in Triton."""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import clamp, flag, minimum
from momo_hf.optim.kernels.triton_tensors import (
    ANOTHER,
    GRAD,
    MOMENTUM,
    OTHER,
    PARAM,
    SECOND,
    direction,
    find,
    momentum,
    read,
    rsqrt_correction,
    second_moment,
    take_in,
    write,
)


# z - y, and y itself, which is the parameter where that can hold it.
AHEAD, Y = OTHER, ANOTHER


@triton.jit
def bounded(u, bound: tl.constexpr):
    """u with entries of at most `bound`, where there is one."""
    if bound is not None:
        u = clamp(minimum(u, bound), -bound)
    return u


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
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    bound: tl.constexpr,
    shrinks: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """<g, u>, <g, z - y>, <g, z> where the decay is proximal, and where nothing is known the sum of v, or of the d of a costly
    method; otherwise they are written.
    """
    row = tl.program_id(0)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    v = take_in(second_moment(place, directions, offsets, mask, g, adam, costly, aligned), g, beta2, adam)
    taken = 0.0
    if adam or costly:
        average = v
        if costly:
            average = momentum(place, offsets, mask, g, weight, aligned)
        if finite_known:
            written = offsets < size * tl.load(inputs_valid).to(tl.int64)
            write(place, MOMENTUM if costly else SECOND, offsets, written, average, tl.float32, aligned)
        else:
            taken = tl.sum(tl.where(mask, average, 0.0))
    ahead = tl.sum(g * read(place, AHEAD, offsets, mask, tl.float32, aligned))
    overlap = 0.0
    if shrinks:
        overlap = ahead + tl.sum(g * read(place, Y, offsets, mask, tl.float32, aligned))
    u = bounded(direction(g, v, mask, rsqrt_correction(tl.load(step), log_beta2, adam), eps, adam, costly), bound)
    tl.store(sums + row * 4, tl.sum(g * u))
    tl.store(sums + row * 4 + 1, ahead)
    tl.store(sums + row * 4 + 2, overlap)
    tl.store(sums + row * 4 + 3, taken)


@triton.jit(do_not_specialize_on_alignment=["factor", "decay", "part"])
def second_pass(
    places,
    blocks,
    directions,
    step,
    weight,
    factor,
    decay,
    part,
    ok,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    beta2: tl.constexpr,
    log_beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    costly: tl.constexpr,
    bound: tl.constexpr,
    decays: tl.constexpr,
    divide: tl.constexpr,
    interpolation: tl.constexpr,
    to_x: tl.constexpr,
    late: tl.constexpr,
    finite_known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """z - y and y, and v or d if the first pass has not written it; the parameter too where it cannot hold y.

    Args:
        part: w / Σ w.
        to_x: 1/β - 1.
        bound: of the entries of u, for tables of embeddings; None where there is none.
        late: r where the average is that of these parameters' own steps, see `Averaged.numbers`, and otherwise 0.
    """
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    written = offsets < size * tl.load(ok).to(tl.int64)
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    v = second_moment(place, directions, offsets, mask, g, adam, costly, aligned)
    if adam and not finite_known:
        v = take_in(v, g, beta2, adam)
        write(place, SECOND, offsets, written, v, tl.float32, aligned)
    if costly and not finite_known:
        d = momentum(place, offsets, mask, g, weight, aligned)
        write(place, MOMENTUM, offsets, written, d, tl.float32, aligned)
    k, c = tl.load(step), tl.load(part)
    if late:
        own = 2 / (k + 1)
        if late == 3:
            own *= own * k
        c = tl.where(flag(ok), tl.maximum(c, own), c)
    ahead = read(place, AHEAD, offsets, mask, tl.float32, aligned)
    y = read(place, Y, offsets, mask, tl.float32, aligned)
    x = y - to_x * ahead
    u = bounded(direction(g, v, mask, rsqrt_correction(k, log_beta2, adam), eps, adam, costly), bound)
    ahead -= tl.load(factor) * interpolation * u
    if decays and divide:
        a = tl.load(decay)
        ahead = (ahead - interpolation * a * x) / (1 + a)  # β (z_{k+1} - x)
    elif decays:
        ahead -= interpolation * tl.load(decay) * y
    y = x + (to_x + c) * ahead
    write(place, AHEAD, offsets, written, (1 - c) * ahead, tl.float32, aligned)
    write(place, Y, offsets, written, y, tl.float32, aligned)
    if param_dtype != tl.float32:
        write(place, PARAM, offsets, written, y, param_dtype, aligned)
