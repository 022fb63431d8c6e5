"""Directions of whole tensors whose parts lie on several processes."""

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.method import Buffers, Method, Options
from momo_hf.optim.tensors.sharding import is_dtensor


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Gathered(Method):
    """A method that needs whole parameters, for parameters of one shape that are split alike over processes.

    Its functions see stacks of the parts on this process. For a direction the stack is divided by parameters instead, so that
    every process computes the direction of whole ones, of its share, and gets back its parts of all. Where n processes hold the
    parts, a parameter sends and receives (n-1)/n of its elements each way, in the dtype to compute in.

    Args:
        method: without buffers.
        shape: of the whole parameters.
        mesh: the processes.
        placements: of a parameter on the mesh.
    """

    whole = True

    def __init__(self, method: Method, shape: torch.Size, mesh: "DeviceMesh", placements: tuple[Any, ...]) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.method, self.shape, self.mesh = method, shape, mesh
        self.holders = math.prod(
            mesh.size(i) for i, placement in enumerate(placements) if not placement.is_replicate()
        )
        self.costly, self.keeps_momentum, self.ramp_start = method.costly, method.keeps_momentum, method.ramp_start
        self.parts = [in_a_stack(placement) for placement in placements]
        self.shares = [Replicate() if placement.is_replicate() else Shard(0) for placement in placements]

    def direction(self, vector: Tensor, buffers: Buffers, options: Options) -> Tensor:
        mine = self._exchanged(vector, len(vector), self.parts, self.shares)
        if len(mine):
            mine = self.method.direction(mine, {}, options)
        return self._exchanged(mine, len(vector), self.shares, self.parts).to(vector.device)

    def sample(self, grad: Tensor, momentum: Tensor, buffers: Buffers, options: Options) -> Tensor:
        mine, average = (self._exchanged(stack, len(stack), self.parts, self.shares) for stack in (grad, momentum))
        found = self.method.sample(mine, average, {}, options) if len(mine) else grad.new_zeros(())
        return found.to(grad.device)

    def _exchanged(self, stack: Tensor, count: int, before: list[Any], after: list[Any]) -> Tensor:
        """A stack of `count` parameters in another layout, where the processes communicate."""
        from torch.distributed.tensor import DTensor

        size = torch.Size((count, *self.shape))
        held = stack.to(self.mesh.device_type).contiguous()
        strides = torch.empty(size, device="meta").stride()
        whole = DTensor.from_local(held, self.mesh, before, run_check=False, shape=size, stride=strides)
        return whole.redistribute(placements=after).to_local()


class Parts(NamedTuple):
    """How a parameter is split, for one that is needed whole.

    Attributes:
        shape: of the whole.
        mesh: the processes.
        placements: on the mesh.
    """

    shape: torch.Size
    mesh: "DeviceMesh"
    placements: tuple[Any, ...]


def parts_of(param: Tensor, method: Method) -> Parts:
    """How a parameter that lies on several processes is split.

    Raises:
        RuntimeError: it is a flat part, whose whole has no shape, or the method has buffers.
    """
    if is_dtensor(param) and not method.buffers:
        return Parts(param.shape, param.device_mesh, tuple(param.placements))
    raise RuntimeError(
        f"{type(method).__name__} needs whole parameters, and one of shape {tuple(param.shape)} is split over processes: "
        "train under FSDP2 or DistributedDataParallel in place of ZeRO, or give these parameters a method that works element by "
        "element."
    )


@functools.cache
def gathered(method: Method, parts: Parts) -> Gathered:
    """The method for parameters that are split like this; the same at every step."""
    return Gathered(method, *parts)


def in_a_stack(placement: Any) -> Any:
    """How a stack is split whose tensors are: it has one dimension more, the first."""
    if placement.is_replicate():
        return placement
    factor = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + 1, **factor)
