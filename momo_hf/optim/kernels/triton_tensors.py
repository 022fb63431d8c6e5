"""How a kernel in Triton finds its block in lists of tensors, and what the passes of all kinds of step do to it.

A launch walks over blocks of all tensors. Two tables on the device say where they are: `places` has a row per tensor with
its size and the addresses of its roles, `blocks` a row per block with its tensor and where in it the block begins. Every
block writes its part of the sums to a row of its own, so that they are added in the same order in every run.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import debias


# Elements of a block: enough to hide the load of its row, few enough for the registers of one program.
BLOCK = 2048
# Where the size and the roles stand in a row of `places`; the last two are what the kind of step has beside the others.
SIZE, PARAM, GRAD, SECOND, AVERAGE, OTHER, WIDTH = (tl.constexpr(i) for i in range(7))


@triton.jit
def find(places, blocks, block: tl.constexpr, aligned: tl.constexpr):
    """The row of this program's tensor, where the elements of its block are in it, and its size."""
    row = tl.program_id(0)
    place = places + tl.load(blocks + row * 2) * WIDTH
    start = tl.load(blocks + row * 2 + 1)
    size = tl.load(place + SIZE)
    if aligned:
        start, size = tl.multiple_of(start, block), tl.multiple_of(size, 4)
    return place, start + tl.arange(0, block), size


@triton.jit
def at(place, role: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address of a role."""
    address = tl.load(place + role).to(tl.pointer_type(dtype))
    if aligned:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def read(place, role: tl.constexpr, offsets, mask, dtype: tl.constexpr, aligned: tl.constexpr):
    """A role in float32."""
    return tl.load(at(place, role, dtype, aligned) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(place, role: tl.constexpr, offsets, mask, values, dtype: tl.constexpr, aligned: tl.constexpr):
    """The values of a role, rounded to its dtype."""
    tl.store(at(place, role, dtype, aligned) + offsets, values.to(dtype), mask=mask)


@triton.jit
def second_moment(place, offsets, mask, like, adam: tl.constexpr, aligned: tl.constexpr):
    """v as it is; anything where there is none."""
    v = like
    if adam:
        v = read(place, SECOND, offsets, mask, tl.float32, aligned)
    return v


@triton.jit
def take_in(v, g, beta2: tl.constexpr, adam: tl.constexpr):
    """v with a gradient more."""
    if adam:
        v = beta2 * v + (1 - beta2) * g * g
    return v


@triton.jit
def rsqrt_correction(step, log_beta2: tl.constexpr, adam: tl.constexpr):
    """1 / sqrt(1 - β2^k)."""
    correction = step
    if adam:
        correction = 1 / tl.sqrt(debias(step, log_beta2))
    return correction


@triton.jit
def direction(vector, v, mask, correction, eps: tl.constexpr, adam: tl.constexpr):
    """D^{-1} vector."""
    u = vector
    if adam:
        u = tl.where(mask, vector / (tl.sqrt(v) * correction + eps), 0.0)
    return u


@triton.jit
def corrected(momentum, step, log_beta: tl.constexpr, corrects: tl.constexpr):
    """d̂ = d/ρ."""
    if corrects:
        momentum = momentum / debias(step, log_beta)
    return momentum
