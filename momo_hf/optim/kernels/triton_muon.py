"""X_0 of Muon's matrices, one after the other in `directions`, from the momentum with a gradient more, in Triton: three
launches for all of them.
"""

import triton
import triton.language as tl

from momo_hf.optim.kernels.triton_math import clamp
from momo_hf.optim.kernels.triton_tensors import FIRST, GRAD, SIZE, WIDTH, among, corrected, find, momentum, read


SMALLEST = tl.constexpr(1.1754943508222875e-38)
# Blocks that a program adds up at once.
LANES = tl.constexpr(1024)


@triton.jit
def sizes(
    places, blocks, directions, sums, weight, grad_dtype: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr
):
    """For every block the largest |d|, the sum of the (d / that)² and |g|²."""
    row = tl.program_id(0)
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    d = momentum(place, offsets, mask, g, weight, aligned)
    largest = clamp(tl.max(tl.abs(d)), SMALLEST)
    d /= largest
    tl.store(sums + row * 3, largest)
    tl.store(sums + row * 3 + 1, tl.sum(d * d))
    tl.store(sums + row * 3 + 2, tl.sum(g * g))


@triton.jit
def norms(
    places,
    sums,
    found,
    samples,
    step,
    log_beta: tl.constexpr,
    corrects: tl.constexpr,
    tiny: tl.constexpr,
    block: tl.constexpr,
):
    """For every matrix |d|_F, or the smallest number where that is 0, and |g|²_F / |d̂|_F."""
    matrix, lane = tl.program_id(0), tl.arange(0, LANES)
    place = places + matrix * WIDTH
    sums += tl.load(place + FIRST) * 3
    count = tl.cdiv(tl.load(place + SIZE), block)
    largest = tl.full((), SMALLEST, tl.float32)
    for start in range(0, count, LANES):
        rows = start + lane
        largest = tl.maximum(largest, tl.max(tl.load(sums + rows * 3, mask=rows < count, other=0.0)))
    squares, grads = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, count, LANES):
        rows = start + lane
        mask = rows < count
        share = tl.load(sums + rows * 3, mask=mask, other=0.0) / largest
        squares += tl.sum(share * share * tl.load(sums + rows * 3 + 1, mask=mask, other=0.0))
        grads += tl.sum(tl.load(sums + rows * 3 + 2, mask=mask, other=0.0))
    norm = largest * clamp(tl.sqrt(squares), 1.0)
    tl.store(found + matrix, norm)
    tl.store(samples + matrix, grads / clamp(corrected(norm, tl.load(step), log_beta, corrects), tiny))


@triton.jit
def scaled(
    places, blocks, directions, weight, norms, grad_dtype: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr
):
    """d / |d|_F."""
    place, offsets, size = find(places, blocks, block, aligned)
    mask = offsets < size
    g = read(place, GRAD, offsets, mask, grad_dtype, aligned)
    d = momentum(place, offsets, mask, g, weight, aligned)
    x = d / tl.load(norms + tl.load(blocks + tl.program_id(0) * 2))
    tl.store(among(place, directions, offsets, aligned), x.to(directions.dtype.element_ty), mask=mask)
