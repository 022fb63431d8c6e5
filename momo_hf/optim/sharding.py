"""Sums of a few scalars over the shards of a model.

The inner products of a step are sums over parameters. Where a parameter is a `DTensor`, this process holds a part of
it, and the sum has to go over the mesh dimensions that shard it; dimensions that replicate it count once.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


# A device mesh and those of its dimensions along which a tensor is sharded; None for a plain tensor.
Layout = tuple[dist.DeviceMesh, tuple[int, ...]] | None


def layout_of(tensor: Tensor) -> Layout:
    """Along which mesh dimensions the tensor is split; None where this process holds all of it.

    Raises:
        ValueError: the tensor holds partial sums, which no optimizer can step on.
    """
    if not isinstance(tensor, DTensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"A parameter has placements {tensor.placements}: redistribute it to Shard or Replicate first."
        )
    dims = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return (tensor.device_mesh, dims) if dims else None


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(sums: Tensor, layout: Layout) -> Tensor:
    """Add up a small vector over the shards of a layout: one collective per sharded mesh dimension.

    Args:
        sums: this process's part, on any device; every process of the mesh calls this at the same point.
        layout: from `layout_of`.

    Returns:
        The total, on the device of `sums`.
    """
    if layout is None:
        return sums
    mesh, dims = layout
    # Parameters may live on the CPU while the mesh communicates between accelerators (offload).
    total = sums.to(mesh.device_type, copy=True)
    for dim in dims:
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total.to(sums.device)


def same_layout_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the parameter's layout, for gradients that a parallel layer left in another one."""
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad
