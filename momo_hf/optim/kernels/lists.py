"""Lists of flat tensors, for kernels that take lists, on a CPU: short enough to stay in the cache between the calls of a pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.kernels.memory import Memory
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import batches, order_of


# Elements of a list, and of a part of a larger tensor.
TOGETHER = 1 << 17
PART = 1 << 19
# Below this number, copying tensors side by side costs less than a call for each.
SMALL = 1 << 12

ByRole = dict[str, list[Tensor]]

# What stands in it is finite, because Adam's kernel clears it by a product with 0.
memory = Memory()


class Division:
    """Tensors in lists: small ones, and those of middle size; larger ones are cut.

    Args:
        sizes: their numbers of elements.
        join: whether a list may have several.
    """

    def __init__(self, sizes: list[int], join: bool = True) -> None:
        small = (i for i, size in enumerate(sizes) if size < SMALL)
        middle = (i for i, size in enumerate(sizes) if SMALL <= size <= PART)
        numel, filled = sizes.__getitem__, TOGETHER if join else 0
        self._lists = [*batches(small, filled, numel), *batches(middle, filled, numel)]
        self._cut = [i for i, size in enumerate(sizes) if size > PART]

    def of(self, tensors: list[Tensor], params: list[Tensor]) -> list[list[Tensor]]:
        """Tensors in lists, flat.

        Args:
            tensors: of a role.
            params: the parameters, whose elements give the order; what has them in another one is copied.
        """
        flat = [t if t.dim() == 1 and t.is_contiguous() else flattened(t, p) for t, p in zip(tensors, params)]
        whole = [[flat[i] for i in together] for together in self._lists]
        return whole + [[part] for i in self._cut for part in flat[i].split(PART)]


def flattened(tensor: Tensor, param: Tensor) -> Tensor:
    """The memory of a tensor in the order of a dense one: its own, or a copy."""
    if tensor.stride() != param.stride() and order_of(tensor) != order_of(param):
        tensor = torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
    # A view of the tensor itself would hold it, and nobody could put another one in its place (`torch.utils.swap_tensors`).
    return tensor.data.as_strided((tensor.numel(),), (1,))


class Divided(NamedTuple):
    """What of a bucket in lists stays from step to step.

    Attributes:
        division: into lists.
        pieces: the lists of every piece, by roles, without gradients.
        sizes: the numbers of elements in them.
        wide: whether all tensors have the dtype to compute in.
    """

    division: Division
    pieces: list[ByRole]
    sizes: list[list[int]]
    wide: bool


def divided(bucket: Bucket) -> Divided:
    """Divide a bucket whose tensors are dense and, gradients apart, in one order."""
    params = bucket.roles["param"]
    division = Division([p.numel() for p in params], bucket.group["foreach"] is not False)
    roles = {role: division.of(tensors, params) for role, tensors in bucket.roles.items() if role != "grad"}
    wide = all(t.dtype == bucket.dtype for tensors in bucket.roles.values() for t in tensors)
    sizes = [[t.numel() for t in together] for together in roles["param"]]
    return Divided(division, [dict(zip(roles, column)) for column in zip(*roles.values())], sizes, wide)


def inner(xs: list[Tensor], ys: list[Tensor]) -> float:
    """<x, y> of all together."""
    if len(xs) > 1 and xs[0].numel() < SMALL:
        xs, ys = ([torch.cat(ts, out=memory.room(name, size_of(ts)))] for name, ts in (("left", xs), ("right", ys)))
    return sum(torch.dot(x, y).item() for x, y in zip(xs, ys))


def clamp(tensors: list[Tensor], bound: float) -> None:
    """Put all entries between -bound and bound."""
    torch._foreach_clamp_max_(tensors, bound)
    torch._foreach_clamp_min_(tensors, -bound)


def size_of(tensors: list[Tensor]) -> int:
    """The number of elements of all together."""
    return sum(map(Tensor.numel, tensors))


def views(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Memory for as many tensors as there are others, of their sizes."""
    return list(flat.split([t.numel() for t in like]))


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors in float32: copies, where they are not."""
    if all(t.dtype == torch.float32 for t in tensors):
        return tensors
    wide = views(torch.empty(size_of(tensors), dtype=torch.float32, device="cpu"), tensors)
    torch._foreach_copy_(wide, tensors)
    return wide
