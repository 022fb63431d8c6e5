"""Tensors as flat pieces of bounded size, or as stacks of whole tensors.

A step reads every tensor twice, and between the reads it needs temporaries. In pieces the temporaries stay in the
cache (CPU) or small (elsewhere), whatever the size of the model: large tensors are cut, small ones are packed. The
mathematics of a method is written once, for one flat tensor, in at least float32. Methods that need the shape of a tensor
get stacks of tensors of one shape instead.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import TypeVar

import torch
from torch import Tensor


# Elements of a piece. On a CPU a few pieces must fit in the cache. Elsewhere a kernel launch must be worth its price, and
# still the temporaries of a pass, up to eight with packs of up to two pieces, stay within 64 MiB in float32.
CPU_PIECE = 1 << 18
DEVICE_PIECE = 1 << 20
# Elements of a stack of whole tensors there: products of matrices want many of them, and what a step keeps of such methods is as
# large as the parameters anyway. Each of the temporaries of a direction, up to six, is as large as a stack.
DEVICE_STACK = 1 << 24
# From about this size on, copying a tensor into a pack costs more than a few calls of its own on a CPU.
PACKED = 1 << 15

T = TypeVar("T")


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

    def read_all(self, roles: Iterable[str]) -> dict[str, Tensor]:
        """`read` of some roles."""
        return {role: self.read(role) for role in roles}

    def write_all(self, tensors: dict[str, Tensor], roles: Iterable[str]) -> None:
        """`write` of some roles."""
        for role in roles:
            self.write(role, tensors[role])

    @cached_property
    def runs(self) -> list[tuple[torch.Size, list[int]]]:
        """The other dimensions and the first ones of neighbours that differ in their first dimension alone.

        They are joined, and parted, in one call; a view of each of them would cost several times as much as the copy.
        """
        shapes = [t.shape for t in next(iter(self.roles.values()))]
        return [(rest, [shape[0] for shape in run]) for rest, run in groupby(shapes, lambda shape: shape[1:])]

    def read(self, role: str) -> Tensor:
        """The role as one flat tensor in the dtype to compute in: the memory itself where it can be, or else a copy."""
        tensors = self.roles[role]
        flat = tensors[0] if len(tensors) == 1 else self._join(tensors)
        flat = flat if flat.dim() == 1 else flat.reshape(-1)
        return flat if flat.dtype == self.dtype else flat.to(self.dtype)

    def write(self, role: str, flat: Tensor) -> None:
        """Put the values of a flat tensor back into the tensors of the role, rounded to their dtype."""
        tensors = self.roles[role]
        if flat is tensors[0] or (len(tensors) == 1 and tensors[0].data_ptr() == flat.data_ptr()):
            return
        sizes = [rest.numel() * sum(lengths) for rest, lengths in self.runs]
        parts = (part.view(-1, *rest).split(lengths) for part, (rest, lengths) in zip(flat.split(sizes), self.runs))
        torch._foreach_copy_(tensors, list(chain.from_iterable(parts)))

    def _join(self, tensors: list[Tensor]) -> Tensor:
        runs, start = [], 0
        for _, lengths in self.runs:
            runs.append(torch.cat(tensors[start : start + len(lengths)]).reshape(-1))
            start += len(lengths)
        return torch.cat(runs) if len(runs) > 1 else runs[0]


class Stack(Piece):
    """Tensors of one shape, seen as one tensor with a first dimension more per role."""

    def read(self, role: str) -> Tensor:
        tensors = self.roles[role]
        stack = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
        return stack if stack.dtype == self.dtype else stack.to(self.dtype)

    def write(self, role: str, flat: Tensor) -> None:
        tensors = self.roles[role]
        if len(tensors) > 1 or tensors[0].data_ptr() != flat.data_ptr():
            torch._foreach_copy_(tensors, list(flat.unbind()))


def stacks(
    roles: dict[str, list[Tensor]], dtype: torch.dtype, shape: torch.Size | None = None, holders: int = 1
) -> Iterator[Stack]:
    """Collect tensors of one shape, as many as have the elements of a large piece together, or one; for every process.

    Args:
        roles: for every role one tensor per parameter, in the same order.
        dtype: the dtype to compute in.
        shape: of the whole tensors, where these are parts of tensors of one shape, perhaps empty ones.
        holders: the number of processes that share them, if so.
    """
    by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for row in zip(*roles.values()):
        if shape is not None or row[0].numel():
            by_shape.setdefault(row[0].shape, []).append(row)
    for own, rows in by_shape.items():
        size = DEVICE_PIECE if rows[0][0].is_cpu else DEVICE_STACK
        count = holders * max(1, size // (own if shape is None else shape).numel())
        for together in (rows[i : i + count] for i in range(0, len(rows), count)):
            yield Stack({role: list(column) for role, column in zip(roles, zip(*together))}, dtype)


def pieces(roles: dict[str, list[Tensor]], dtype: torch.dtype, pack: bool = True) -> Iterator[Piece]:
    """Cut and pack tensors of one device into pieces.

    Args:
        roles: for every role one tensor per parameter, in the same order.
        dtype: the dtype to compute in.
        pack: whether tensors smaller than a piece share one.

    Yields:
        Pieces that cover every element once, in an order that depends on sizes and layouts alone.
    """
    small: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    size = 0
    for row in zip(*roles.values()):
        first = row[0]
        size = CPU_PIECE if first.is_cpu else DEVICE_PIECE
        if first.numel() >= (min(PACKED, size) if first.is_cpu else size) and all(t.is_contiguous() for t in row):
            for parts in zip(*(t.view(-1).split(size) for t in row)):
                yield Piece({role: [part] for role, part in zip(roles, parts)}, dtype)
        elif first.numel():
            row = tuple(t.view(1) for t in row) if first.dim() == 0 else row
            small.setdefault(row[0].shape[1:], []).append(row)
    # Those that are joined in one call stand together.
    rows = chain.from_iterable(small.values())
    for together in batches(rows, size if pack else 0, lambda row: row[0].numel()):
        yield Piece({role: list(column) for role, column in zip(roles, zip(*together))}, dtype)


def batches(items: Iterable[T], size: int, numel: Callable[[T], int]) -> Iterator[list[T]]:
    """Divide tensors, or whatever else has a number of elements, into lists.

    Args:
        items: in any order, which is kept.
        size: elements of a list; its last item may go beyond, and the last list may have fewer.
        numel: the number of elements of an item.
    """
    batch, filled = [], 0
    for item in items:
        batch.append(item)
        filled += numel(item)
        if filled >= size:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape fill their memory in one order, perhaps with the channels last, as `Module.to` puts those of
    convolutions; element by element they can then be read as flat ones.
    """
    first = tensors[0]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    other = formats.get(first.dim(), torch.contiguous_format)
    dense = first.is_contiguous() or first.is_contiguous(memory_format=other)
    return dense and all(order_of(t) == order_of(first) for t in tensors)


def order_of(tensor: Tensor) -> list[int]:
    """The strides that count: those of dimensions with one element say nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size != 1]
