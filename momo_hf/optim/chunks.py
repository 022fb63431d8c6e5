"""Parameters, gradients and buffers as flat pieces of bounded size.

A step reads every tensor twice, and between the reads it needs temporaries. In pieces the temporaries stay in the
cache (CPU) or small (elsewhere), whatever the size of the model: large tensors are cut, small ones are packed. The
mathematics of a method is written once, for one flat tensor, in at least float32.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from momo_hf.optim.sharding import Layout, local, same_layout_gradient


# Elements of a piece. On a CPU a few pieces must fit in the cache; elsewhere a kernel launch must be worth its price.
CPU_PIECE = 1 << 17
DEVICE_PIECE = 1 << 24
# From about this size on, copying a tensor into a pack costs more than a few calls of its own on a CPU.
PACKED = 1 << 15
# Tensors in one call of a compiled function; only this number and 1 occur, so that it is compiled twice and not more.
BATCH = 8

# Options that every method has. A method is given only its own ones, which stay the same from step to step, so that a
# compiled pass is not compiled anew when the lr changes.
SHARED_BY_METHODS = (
    "lr", "weight_decay", "lb", "beta", "bias_correction", "use_fstar", "divide", "slope", "foreach", "compile",
)  # fmt: skip


class Piece:
    """Some tensors of one or more parameters, seen as one flat tensor per role ("param", "grad", "exp_avg", ...).

    Args:
        roles: for every role the tensors, in the same order of parameters and of the same sizes.
        dtype: the dtype to compute in.
    """

    def __init__(self, roles: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
        self.roles = roles
        self.dtype = dtype

    def read(self, role: str, copy: bool = False) -> Tensor:
        """The role as one flat tensor in the dtype to compute in: the memory itself where it can be, unless `copy`."""
        tensors = self.roles[role]
        flat = tensors[0].reshape(-1) if len(tensors) == 1 else _flatten_dense_tensors(tensors)
        flat = flat.to(self.dtype)
        return flat.clone() if copy and flat.data_ptr() == tensors[0].data_ptr() else flat

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


def take_large(
    roles: dict[str, list[Tensor]],
) -> tuple[list[list[dict[str, Tensor]]], dict[str, list[Tensor]]]:
    """Divide tensors into batches for compiled passes, of flat tensors of one size by role, and the roles of the others.

    A compiled function costs tens of microseconds a call, so tensors of one size, as layers have them, share calls.
    Small tensors are left out, because copying them into packs costs less.
    """
    by_size: dict[int, list[dict[str, Tensor]]] = {}
    others: dict[str, list[Tensor]] = {role: [] for role in roles}
    for row in zip(*roles.values()):
        if row[0].numel() >= PACKED and all(t.is_contiguous() for t in row):
            # `data` drops the note which tensor it is a view of; the compiler would compile anew for each kind of view.
            flat = dict(zip(roles, (t.view(-1).data for t in row)))
            by_size.setdefault(row[0].numel(), []).append(flat)
        else:
            for role, tensor in zip(roles, row):
                others[role].append(tensor)
    batches = []
    for alike in by_size.values():
        full = len(alike) - len(alike) % BATCH
        batches += [alike[i : i + BATCH] for i in range(0, full, BATCH)] + [[one] for one in alike[full:]]
    return batches, others


class Bucket(NamedTuple):
    """Parameters that are updated alike: same device, dtype, layout and options, from one group or several."""

    index: int  # of the first group they come from
    group: dict[str, Any]
    options: dict[str, Any]  # the method's own hyperparameters
    layout: Layout | None
    moves: bool  # False where there is no gradient: the momentum decays, the parameter stays
    roles: dict[str, list[Tensor]]
    pieces: list[Piece]
    batches: list[list[dict[str, Tensor]]]  # for compiled passes; the pieces are the others

    @property
    def device(self) -> torch.device:
        return self.roles["param"][0].device

    @property
    def decays(self) -> bool:
        return self.group["weight_decay"] != 0

    @property
    def uniform(self) -> bool:
        """Whether torch's fused kernels take the tensors as they are."""
        dtype = self.roles["param"][0].dtype
        return all(t.dtype == dtype and t.is_contiguous() for tensors in self.roles.values() for t in tensors)


def sort_into_buckets(
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    names: tuple[str, ...],
    options: tuple[str, ...],
    layout_of: Callable[[Tensor], Layout | None],
    dtype: torch.dtype,
) -> list[Bucket]:
    """Collect the parameters of all groups that are updated alike, so that many small groups cost no more than one.

    It is done anew at every step: FSDP, accelerate and DeepSpeed exchange parameters behind the optimizer's back.

    Args:
        param_groups: the groups of the optimizer.
        state: its state per parameter.
        names: the entries of the state that the method works on.
        options: the keys of a group that decide how its parameters are updated.
        layout_of: how a parameter is split over processes.
        dtype: the dtype to compute in.

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    members: dict[tuple, list[tuple[Tensor, Tensor | None]]] = {}
    first: dict[tuple, int] = {}
    for index, group in enumerate(param_groups):
        alike = tuple(tuple(v) if isinstance(v, list) else v for v in (group[name] for name in options))
        alike = first.setdefault(alike, index)  # a short key for what all these parameters share
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                if p not in state:
                    continue
            elif grad.is_sparse or grad.is_complex():
                kind, fix = ("sparse", "sparse=False") if grad.is_sparse else ("complex", "torch.view_as_real")
                raise RuntimeError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} is {kind}, which MoMo does not take: "
                    f"build the parameter with {fix}."
                )
            key = (alike, p.device, p.dtype, layout_of(p), grad is not None)
            if key not in members:
                members[key] = []
            members[key].append((p, grad))
    buckets = []
    for (index, _, _, layout, moves), pairs in members.items():
        group = param_groups[index]
        roles: dict[str, list[Tensor]] = {role: [] for role in ("param", "grad", *names)}
        for p, grad in pairs:
            grad = same_layout_gradient(p, grad) if moves else torch.zeros_like(p)
            for role, tensor in zip(roles, (p, grad, *map(state[p].get, names))):
                roles[role].append(local(tensor))
        batches, others = take_large(roles) if group["compile"] and moves else ([], roles)
        parts = list(pieces(others, dtype, group["foreach"] is not False))
        own = {name: group[name] for name in options if name not in SHARED_BY_METHODS}
        buckets.append(Bucket(index, group, own, layout, moves, roles, parts, batches))
    return buckets
