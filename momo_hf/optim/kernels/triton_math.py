"""What the kernels in Triton share: arithmetic that treats NaN and small numbers as torch does."""

import triton
import triton.language as tl


INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def every(x):
    return tl.min(x.to(tl.int32), 0) == 1


@triton.jit
def clamp(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lerp(start, end, weight):
    """From the nearer end, so that a weight of 1 gives all of `end` however large `start` is."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (1 - weight) * (end - start))


@triton.jit
def flag(pointer):
    """A bool from memory."""
    return tl.load(pointer).to(tl.int32) != 0


@triton.jit
def debias(step, log_beta: tl.constexpr):
    """1 - β^k. Near 0 by the series of expm1, because the plain formula loses five digits there."""
    x = step * log_beta
    series = 1 + x / 6 * (1 + x / 7)
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series))))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def average_weight(step, beta: tl.constexpr, bias_correction: tl.constexpr):
    """`model.average_weight`."""
    weight = tl.full((), 1.0 - beta, tl.float32)
    if not bias_correction:
        weight = tl.where(step == 1, 1.0, weight)
    return weight
