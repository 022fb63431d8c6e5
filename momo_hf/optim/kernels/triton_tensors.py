"""How a kernel in Triton finds its block in lists of tensors, and what the passes of all kinds of step do to it.

A launch walks over blocks of all tensors. Two tables on the device say where they are: `places` has a row per tensor with
its size, the addresses of its roles and its first block, `blocks` a row per block with its tensor and where in it the block
begins. Every block writes its part of the sums to a row of its own, so that they are added in the same order in every run.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import debias


# Elements of a block: enough to hide the load of its row, few enough for the registers of one program.
BLOCK = 2048
# What stands where in a row of `places`. Two roles are what the kind of step has beside the others; a costly method has, in
# the place of v, the number of elements before the tensor's among the directions.
SIZE, PARAM, GRAD, SECOND, MOMENTUM, OTHER, ANOTHER, FIRST, WIDTH = (tl.constexpr(i) for i in range(9))


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
def among(place, directions, offsets, aligned: tl.constexpr):
    """Where the direction of a costly method stands."""
    address = directions + tl.load(place + SECOND)
    if aligned:
        address = tl.multiple_of(address, 16)
    return address + offsets


@triton.jit
def momentum(place, offsets, mask, g, weight, aligned: tl.constexpr):
    """d with a gradient more."""
    d = read(place, MOMENTUM, offsets, mask, tl.float32, aligned)
    return d + tl.load(weight) * (g - d)


@triton.jit
def second_moment(
    place, directions, offsets, mask, like, adam: tl.constexpr, costly: tl.constexpr, aligned: tl.constexpr
):
    """v as it is, or the direction of a costly method; anything where there is neither."""
    v = like
    if adam:
        v = read(place, SECOND, offsets, mask, tl.float32, aligned)
    if costly:
        v = tl.load(among(place, directions, offsets, aligned), mask=mask, other=0.0).to(tl.float32)
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
def direction(vector, v, mask, correction, eps: tl.constexpr, adam: tl.constexpr, costly: tl.constexpr):
    """D^{-1} vector, or what was made before, see `second_moment`."""
    u = vector
    if costly:
        u = v
    if adam:
        u = tl.where(mask, vector / (tl.sqrt(v) * correction + eps), 0.0)
    return u


@triton.jit
def corrected(momentum, step, log_beta: tl.constexpr, corrects: tl.constexpr):
    """d̂ = d/ρ."""
    if corrects:
        momentum = momentum / debias(step, log_beta)
    return momentum
