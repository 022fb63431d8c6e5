"""The two passes of a step over all parameters: the sums over shards between them."""

from collections.abc import Iterable

from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels import Kernels, assign
from momo_hf.optim.method import Method
from momo_hf.optim.model import Step
from momo_hf.optim.sharding import Layout, sum_over_shards


def prepare(method: type[Method], buckets: list[Bucket], weight: Tensor, step: Tensor) -> list[Kernels]:
    """Kernels for every tensor of the buckets.

    Args:
        method: the method.
        buckets: the parameters.
        weight: 1-β_k, 0-dim.
        step: k, 0-dim.
    """
    return [
        kernels(method, b, weight.to(b.device, b.dtype), step.to(b.device, b.dtype))
        for kernels, b in assign(method, buckets)
    ]


def inner_products(
    kernels: list[Kernels], strayed: dict[Layout | None, Tensor], groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First pass, and the one sum over all shards.

    Args:
        kernels: from `prepare`.
        strayed: for every layout, in the same order on all processes, what else is to be summed over its shards; a
            scalar with dtype and device of the result.
        groups: number of parameter groups.

    Returns:
        n_g = <d_g, u_g>, s_g = <d_g, x_g> and <g_g, D_g^{-1} g_g>, with one entry per parameter group, the last one 0
        unless the slope of the samples is asked for; and the sum of `strayed`, 0-dim.
    """
    sums = {}
    for layout, value in strayed.items():
        sums[layout] = value.new_zeros(4, groups)
        sums[layout][3, 0] = value
    for part in kernels:
        if part.bucket.moves:
            total = sums[part.bucket.layout]
            total[:3, part.bucket.index] += part.products().to(total)
    norms, overlaps, samples, rest = sum(sum_over_shards(part, layout) for layout, part in sums.items())
    return norms, overlaps, samples, rest[0]


def write(kernels: list[Kernels], update: Step, layouts: Iterable[Layout | None]) -> dict[Layout | None, Tensor]:
    """Second pass: the momentum, the buffers and the parameters.

    Returns:
        <d, x> after the step and <d, rounding>, shape (2,), of this process's part for every layout.
    """
    found = {layout: update.factor.new_zeros(2) for layout in layouts}
    for part in kernels:
        bucket = part.bucket
        factor, decay = (v[bucket.index].to(bucket.device, bucket.dtype) for v in (update.factor, update.decay))
        found[bucket.layout] += part.write(factor, decay, update.ok.to(bucket.device)).to(update.factor)
    return found
