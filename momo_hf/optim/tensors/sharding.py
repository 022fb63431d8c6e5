"""Sums of a few scalars over the shards of a model.

The inner products of a step are sums over parameters. Where this process holds only a part of a parameter, the sum
has to go over the processes that hold the other parts; processes that hold copies of one part count once.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch.distributed as dist
from torch import Tensor


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def dtensor_type() -> type | tuple[()]:
    """DTensor for `isinstance`. Nobody has one before its module was imported, which takes half as long as torch."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def is_dtensor(value: Any) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor."""
    return isinstance(value, dtensor_type())


def has_dtensors(tensors: Iterable[Tensor]) -> bool:
    """Whether some are DTensors."""
    kinds, dtensor = set(map(type, tensors)), dtensor_type()
    return any(issubclass(kind, dtensor) for kind in kinds)


class Layout(NamedTuple):
    """How a parameter is split: the process groups to sum over, one after the other, and where they communicate."""

    groups: tuple[dist.ProcessGroup, ...]
    device_type: str


def layout_of(tensor: Tensor, shard_group: dist.ProcessGroup | None = None) -> Layout | None:
    """How the tensor is split over processes; None where this process holds all of it.

    Args:
        tensor: a parameter.
        shard_group: for plain tensors that are parts of a flat partition (ZeRO): the processes that hold the others.

    Raises:
        ValueError: the tensor holds partial sums, which no optimizer can step on.
    """
    if not is_dtensor(tensor):
        return None if shard_group is None else Layout((shard_group,), tensor.device.type)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"A parameter has placements {tensor.placements}: redistribute it to Shard or Replicate first."
        )
    mesh = tensor.device_mesh
    dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return Layout(tuple(mesh.get_group(dim) for dim in dims), mesh.device_type) if dims else None


def layouts_of(tensors: list[Tensor], shard_group: dist.ProcessGroup | None = None) -> list[Layout | None]:
    """`layout_of` of many parameters, without a call for each where all are plain."""
    if shard_group is None and not has_dtensors(tensors):
        return [None] * len(tensors)
    return [layout_of(t, shard_group) for t in tensors]


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself where it is spread over processes."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def sum_over_shards(sums: Tensor, layout: Layout | None) -> Tensor:
    """Add up a small vector over the shards of a layout.

    Args:
        sums: this process's part, on any device; every process of the layout calls this at the same point.
        layout: from `layout_of`.

    Returns:
        The total, on the device of `sums`.
    """
    if layout is None:
        return sums
    # Parameters may live on the CPU while their processes communicate between accelerators (offload).
    total = sums.to(layout.device_type, copy=True)
    for group in layout.groups:
        dist.all_reduce(total, group=group)
    return total.to(sums.device)


def same_layout_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the parameter's layout, for gradients that a parallel layer left in another one."""
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad
