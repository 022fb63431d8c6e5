"""The two passes of a step over all parameters: the sums over shards between them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels import Kernels, assign
from momo_hf.optim.method import Method
from momo_hf.optim.model import Step, debias
from momo_hf.optim.sharding import Layout, sum_over_shards


def prepare(
    method: type[Method], buckets: list[Bucket], weight: Tensor, step: Tensor, usable: Tensor | None
) -> list[Kernels]:
    """Kernels for every tensor of the buckets.

    Args:
        method: the method.
        buckets: the parameters.
        weight: 1-β_k, 0-dim.
        step: k, 0-dim.
        usable: whether loss and gradients are finite, 0-dim, or None if that is not known yet.
    """
    made = []
    for kernels, b in assign(method, buckets, usable is not None):
        known = None if usable is None else usable.to(b.device)
        made.append(kernels(method, b, weight.to(b.device, b.dtype), own_step(b, step).to(b.device, b.dtype), known))
    return made


def gradient_norm(buckets: list[Bucket], like: Tensor) -> Tensor:
    """The sum of the norms of all gradients, 0-dim: not finite where one of them is not, or is too large to be squared."""
    norms = [
        torch.stack(torch._foreach_norm(bucket.roles["grad"], 2, dtype=bucket.dtype)).sum().to(like)
        for bucket in buckets
        if bucket.moves
    ]
    return sum(norms[1:], norms[0]) if norms else torch.zeros_like(like)


def own_step(bucket: Bucket, step: Tensor) -> Tensor:
    """k for the parameters of a bucket: those that joined a running model have had fewer steps."""
    return step if bucket.start is None else step - bucket.start


def catch_up(bucket: Bucket, step: Tensor) -> Tensor | float:
    """The factor in D^{-1} of parameters that joined a running model.

    Their average d started later at 0 than the averages of the others, and the step size corrects all by ρ of these. So
    that a step at the cap is Adam's for them too, their D^{-1} has ρ_k over ρ of their own count.
    """
    group = bucket.group
    if bucket.start is None or not group["bias_correction"]:
        return 1.0
    beta = group["beta"] if "beta" in group else group["betas"][0]
    return debias(beta, step) / debias(beta, own_step(bucket, step))


def inner_products(
    kernels: list[Kernels], strayed: dict[Layout | None, Tensor], groups: int, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First pass, and the one sum over all shards.

    Args:
        kernels: from `prepare`.
        strayed: for every layout, in the same order on all processes, what else is to be summed over its shards; a
            scalar with dtype and device of the result.
        groups: number of parameter groups.
        step: k, 0-dim.

    Returns:
        n_g = <d_g, u_g>, s_g = <d_g, x_g> and |g_g|², with one entry per parameter group, the last two 0 unless they are
        asked for (see `Kernels.products`); and the sum of `strayed`, 0-dim.
    """
    like = next(iter(strayed.values()))
    found: dict[Layout | None, list[Tensor | None]] = {layout: [None] * groups for layout in strayed}
    for part in kernels:
        if not part.bucket.moves:
            continue
        row, late, total = part.products().to(like), catch_up(part.bucket, step), found[part.bucket.layout]
        if torch.is_tensor(late):
            row = row * torch.stack([late, torch.ones_like(late), torch.ones_like(late)])
        index = part.bucket.index
        total[index] = row if total[index] is None else total[index] + row
    sums = []
    for layout, value in strayed.items():
        rows = [value.new_zeros(3) if row is None else row for row in found[layout]]
        sums.append(sum_over_shards(torch.cat([*rows, value.view(1)]), layout))
    products, rest = sum(sums[1:], sums[0]).split([3 * groups, 1])
    return *products.view(groups, 3).unbind(1), rest.view(())


def write(
    kernels: list[Kernels], update: Step, layouts: Iterable[Layout | None], step: Tensor
) -> dict[Layout | None, Tensor]:
    """Second pass: the momentum, the buffers and the parameters.

    Returns:
        <d, x> after the step and <d, rounding>, shape (2,), of this process's part for every layout.
    """
    found: dict[Layout | None, Tensor] = {}
    factors, decays = update.factor.unbind(), update.decay.unbind()
    for part in kernels:
        bucket = part.bucket
        factor, late = factors[bucket.index], catch_up(bucket, step)
        factor = factor * late if torch.is_tensor(late) else factor
        factor, decay = (value.to(bucket.device, bucket.dtype) for value in (factor, decays[bucket.index]))
        sums = part.write(factor, decay, update.ok.to(bucket.device)).to(update.factor)
        found[bucket.layout] = sums + found[bucket.layout] if bucket.layout in found else sums
    return {layout: found.get(layout, update.factor.new_zeros(2)) for layout in layouts}
