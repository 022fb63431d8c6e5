"""The two passes over many tensors in one launch each, in Triton; imported where they are used, because Triton is optional.

A launch walks over blocks of all tensors. Two tables on the device say where they are: `places` has a row per tensor with
the addresses of its roles and its size, `blocks` a row per block with its tensor and where in it the block begins. Every
block writes its part of the sums to a row of its own, so that they are added in the same order in every run.
"""

import triton
import triton.language as tl


# Elements of a block: enough to hide the load of its row, few enough for the registers of one program.
BLOCK = 2048
# Where the roles stand in a row of `places`.
PARAM, GRAD, MOMENTUM, SECOND, SIZE = (tl.constexpr(i) for i in range(5))


@triton.jit
def _block(places, blocks, block: tl.constexpr, aligned: tl.constexpr):
    """The tensor of this program's block, where its elements are in it, and its size."""
    row = tl.program_id(0)
    tensor = tl.load(blocks + row * 2)
    start = tl.load(blocks + row * 2 + 1)
    size = tl.load(places + tensor * 5 + SIZE)
    if aligned:
        start, size = tl.multiple_of(start, block), tl.multiple_of(size, 4)
    return tensor, start + tl.arange(0, block), size


@triton.jit
def _at(places, tensor, role: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address of a role of a tensor."""
    address = tl.load(places + tensor * 5 + role).to(tl.pointer_type(dtype))
    if aligned:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _momentum(places, tensor, offsets, mask, aligned: tl.constexpr):
    """d as it is."""
    return tl.load(_at(places, tensor, MOMENTUM, tl.float32, aligned) + offsets, mask=mask, other=0.0)


@triton.jit
def _averages(
    places,
    tensor,
    offsets,
    mask,
    before,
    weight,
    grad_dtype: tl.constexpr,
    beta2: tl.constexpr,
    adam: tl.constexpr,
    aligned: tl.constexpr,
):
    """g, and d and v as they are going to be, from d as it is."""
    g = tl.load(_at(places, tensor, GRAD, grad_dtype, aligned) + offsets, mask=mask, other=0.0).to(tl.float32)
    d = before + weight * (g - before)
    v = d
    if adam:
        v = tl.load(_at(places, tensor, SECOND, tl.float32, aligned) + offsets, mask=mask, other=0.0)
        v = beta2 * v + (1 - beta2) * g * g
    return g, d, v


@triton.jit
def _store(places, tensor, offsets, mask, d, v, adam: tl.constexpr, aligned: tl.constexpr):
    tl.store(_at(places, tensor, MOMENTUM, tl.float32, aligned) + offsets, d, mask=mask)
    if adam:
        tl.store(_at(places, tensor, SECOND, tl.float32, aligned) + offsets, v, mask=mask)


@triton.jit
def _direction(d, v, mask, correction, eps: tl.constexpr, adam: tl.constexpr):
    """u = D^{-1} d."""
    u = d
    if adam:
        u = tl.where(mask, d / (tl.sqrt(v) * correction + eps), 0.0)
    return u


@triton.jit
def first_pass(
    places,
    blocks,
    sums,
    weight,
    correction,
    ok,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    decays: tl.constexpr,
    known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """<d, u>, <d, x> where the bucket decays and |g|² where it is not known to be finite; otherwise d and v are written."""
    row = tl.program_id(0)
    tensor, offsets, size = _block(places, blocks, block, aligned)
    mask = offsets < size
    before = _momentum(places, tensor, offsets, mask, aligned)
    g, d, v = _averages(places, tensor, offsets, mask, before, tl.load(weight), grad_dtype, beta2, adam, aligned)
    overlap = 0.0
    norm = 0.0
    if known:
        _store(places, tensor, offsets, offsets < size * tl.load(ok).to(tl.int64), d, v, adam, aligned)
    else:
        norm = tl.sum(g * g)
    if decays:
        x = tl.load(_at(places, tensor, PARAM, param_dtype, aligned) + offsets, mask=mask, other=0.0).to(tl.float32)
        overlap = tl.sum(d * x)
    tl.store(sums + row * 3, tl.sum(d * _direction(d, v, mask, tl.load(correction), eps, adam)))
    tl.store(sums + row * 3 + 1, overlap)
    tl.store(sums + row * 3 + 2, norm)


# Numbers of several groups stand side by side in memory; the place of one must not make another kernel of it.
@triton.jit(do_not_specialize_on_alignment=["factor", "decay"])
def second_pass(
    places,
    blocks,
    sums,
    weight,
    correction,
    factor,
    decay,
    ok,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    adam: tl.constexpr,
    decays: tl.constexpr,
    divide: tl.constexpr,
    known: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """x, and d and v if the first pass has not written them; <d, x> afterwards and <d, rounding>."""
    row = tl.program_id(0)
    tensor, offsets, size = _block(places, blocks, block, aligned)
    mask = offsets < size
    written = offsets < size * tl.load(ok).to(tl.int64)
    before = _momentum(places, tensor, offsets, mask, aligned)
    if known:
        d = before
        v = d
        if adam:
            v = tl.load(_at(places, tensor, SECOND, tl.float32, aligned) + offsets, mask=mask, other=0.0)
    else:
        g, d, v = _averages(places, tensor, offsets, mask, before, tl.load(weight), grad_dtype, beta2, adam, aligned)
        _store(places, tensor, offsets, written, d, v, adam, aligned)
        d = tl.where(written, d, before)
    place = _at(places, tensor, PARAM, param_dtype, aligned) + offsets
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    new = x
    if decays and not divide:
        new *= 1 - tl.load(decay)
    new -= tl.load(factor) * _direction(d, v, mask, tl.load(correction), eps, adam)
    if decays and divide:
        new /= 1 + tl.load(decay)
    new = tl.where(written, new, x)
    stored = new.to(param_dtype)
    tl.store(place, stored, mask=written)
    rounded = stored.to(tl.float32)
    tl.store(sums + row * 2, tl.sum(d * rounded))
    tl.store(sums + row * 2 + 1, tl.sum(d * (rounded - new)))
