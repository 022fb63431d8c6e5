"""The two passes of a step over all parameters: the sums over shards between them."""

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


def inner_products(kernels: list[Kernels], layouts: list[Layout | None], groups: int, like: Tensor) -> Tensor:
    """First pass: n_g = <d_g, u_g>, s_g = <d_g, x_g> and <g_g, D_g^{-1} g_g> over all shards.

    Args:
        kernels: from `prepare`.
        layouts: every way in which parameters are split, in the same order on all processes.
        groups: number of parameter groups.
        like: a scalar with dtype and device of the result.

    Returns:
        Three rows with one entry per parameter group; the last one is 0 unless the slope of the samples is asked for.
    """
    sums = {layout: like.new_zeros(3, groups) for layout in layouts}
    for part in kernels:
        if part.bucket.moves:
            sums[part.bucket.layout][:, part.bucket.index] += part.products().to(like)
    return sum(sum_over_shards(part, layout) for layout, part in sums.items())


def write(kernels: list[Kernels], update: Step) -> None:
    """Second pass: the momentum, the buffers and the parameters."""
    for part in kernels:
        index, device, dtype = part.bucket.index, part.bucket.device, part.bucket.dtype
        factor, decay = (v[index].to(device, dtype) for v in (update.factor, update.decay))
        part.write(factor, decay, update.ok.to(device))
