"""Tensors as flat pieces of bounded size.

A step reads every tensor twice, and between the reads it needs temporaries. In pieces the temporaries stay in the
cache (CPU) or small (elsewhere), whatever the size of the model: large tensors are cut, small ones are packed. The
mathematics of a method is written once, for one flat tensor, in at least float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors


# Elements of a piece. On a CPU a few pieces must fit in the cache; elsewhere a kernel launch must be worth its price.
CPU_PIECE = 1 << 18
DEVICE_PIECE = 1 << 24
# From about this size on, copying a tensor into a pack costs more than a few calls of its own on a CPU.
PACKED = 1 << 15


class Piece:
    """Some tensors of one or more parameters, seen as one flat tensor per role ("param", "grad", "exp_avg", ...).

    Args:
        roles: for every role the tensors, in the same order of parameters and of the same sizes.
        dtype: the dtype to compute in.
    """

    def __init__(self, roles: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
        self.roles = roles
        self.dtype = dtype
        self.numel = sum(map(Tensor.numel, next(iter(roles.values()))))

    def read(self, role: str) -> Tensor:
        """The role as one flat tensor in the dtype to compute in: the memory itself where it can be."""
        tensors = self.roles[role]
        flat = tensors[0].reshape(-1) if len(tensors) == 1 else _flatten_dense_tensors(tensors)
        return flat if flat.dtype == self.dtype else flat.to(self.dtype)

    def write(self, role: str, flat: Tensor) -> None:
        """Put the values of a flat tensor back into the tensors of the role, rounded to their dtype."""
        tensors = self.roles[role]
        if len(tensors) == 1 and tensors[0].data_ptr() == flat.data_ptr():
            return
        parts = flat.split([t.numel() for t in tensors]) if len(tensors) > 1 else (flat,)
        torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors)])


def pieces(roles: dict[str, list[Tensor]], dtype: torch.dtype, pack: bool = True) -> Iterator[Piece]:
    """Cut and pack tensors of one device into pieces.

    Args:
        roles: for every role one tensor per parameter, in the same order.
        dtype: the dtype to compute in.
        pack: whether tensors smaller than a piece share one.

    Yields:
        Pieces that cover every element once, in an order that depends on sizes and layouts alone.
    """
    small: dict[str, list[Tensor]] = {role: [] for role in roles}
    filled = 0
    for row in zip(*roles.values()):
        numel = row[0].numel()
        if numel == 0:
            continue
        size, alone = (CPU_PIECE, PACKED) if row[0].is_cpu else (DEVICE_PIECE, DEVICE_PIECE)
        if numel >= min(size, alone) and all(t.is_contiguous() for t in row):
            flat = [t.view(-1) for t in row]
            for parts in [flat] if numel <= size else zip(*(t.split(size) for t in flat)):
                yield Piece({role: [part] for role, part in zip(roles, parts)}, dtype)
            continue
        for role, tensor in zip(roles, row):
            small[role].append(tensor)
        filled += numel
        if filled >= size or not pack:
            yield Piece(small, dtype)
            small, filled = {role: [] for role in roles}, 0
    if filled:
        yield Piece(small, dtype)
