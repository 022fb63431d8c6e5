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
# On a CPU, copying a tensor into a pack costs more than a few calls of its own from about this size on.
CPU_PACK = 1 << 15

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

    def read(self, role: str) -> Tensor:
        """The role as one flat tensor: the memory itself where it already is one in the dtype to compute in."""
        tensors = self.roles[role]
        flat = tensors[0] if len(tensors) == 1 else _flatten_dense_tensors(tensors)
        # `data` drops the note which tensor this is a view of; the compiler would compile anew for every kind of view.
        return flat.reshape(-1).to(self.dtype).data

    def read_all(self, but: str | None = None) -> dict[str, Tensor]:
        """Every role as one flat tensor, except for the one that is not needed."""
        return {role: self.read(role) for role in self.roles if role != but}

    def write(self, role: str, flat: Tensor) -> None:
        """Put the values of a flat tensor back into the tensors of the role, rounded to their dtype."""
        tensors = self.roles[role]
        if len(tensors) == 1 and tensors[0].data_ptr() == flat.data_ptr():
            return
        parts = flat.split([t.numel() for t in tensors]) if len(tensors) > 1 else (flat,)
        torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors)])


def pieces(
    roles: dict[str, list[Tensor]], dtype: torch.dtype, pack: bool = True, whole: bool = False
) -> Iterator[Piece]:
    """Cut and pack tensors of one device into pieces.

    Args:
        roles: for every role one tensor per parameter, in the same order.
        dtype: the dtype to compute in.
        pack: whether tensors smaller than a piece share one.
        whole: leave large tensors whole; compiled code has no temporaries of their size.

    Yields:
        Pieces that cover every element once, in an order that depends on sizes and layouts alone.
    """
    small: dict[str, list[Tensor]] = {role: [] for role in roles}
    filled = 0
    for row in zip(*roles.values()):
        numel = row[0].numel()
        if numel == 0:
            continue
        size, alone = (CPU_PIECE, CPU_PACK) if row[0].device.type == "cpu" else (DEVICE_PIECE, DEVICE_PIECE)
        if numel >= min(size, alone) and all(t.is_contiguous() for t in row):
            for parts in zip(*(t.view(-1).split(numel if whole else size) for t in row)):
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


class Bucket(NamedTuple):
    """Parameters that are updated alike: same device, dtype, layout and options, from one group or several."""

    index: int  # of the first group they come from
    group: dict[str, Any]
    options: dict[str, Any]  # the method's own hyperparameters
    layout: Layout | None
    moves: bool  # False where there is no gradient: the momentum decays, the parameter stays
    roles: dict[str, list[Tensor]]
    pieces: list[Piece]

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
    members: dict[tuple, list[Tensor]] = {}
    first: dict[tuple, int] = {}
    for index, group in enumerate(param_groups):
        alike = tuple(tuple(v) if isinstance(v, list) else v for v in (group[name] for name in options))
        for p in group["params"]:
            if p.grad is None and p not in state:
                continue
            if p.grad is not None and (p.grad.is_sparse or p.grad.is_complex()):
                kind, fix = ("sparse", "sparse=False") if p.grad.is_sparse else ("complex", "torch.view_as_real")
                raise RuntimeError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} is {kind}, which MoMo does not take: "
                    f"build the parameter with {fix}."
                )
            key = (p.device, p.dtype, layout_of(p), p.grad is not None, alike)
            members.setdefault(key, []).append(p)
            first.setdefault(key, index)
    buckets = []
    for key, params in members.items():
        layout, moves = key[2:4]
        group = param_groups[first[key]]
        grads = [same_layout_gradient(p, p.grad) if moves else torch.zeros_like(p) for p in params]
        roles = {"param": [local(p.detach()) for p in params], "grad": [local(g.detach()) for g in grads]}
        roles |= {name: [local(state[p][name]) for p in params] for name in names}
        parts = list(pieces(roles, dtype, group["foreach"] is not False, group["compile"]))
        own = {name: group[name] for name in options if name not in SHARED_BY_METHODS}
        buckets.append(Bucket(first[key], group, own, layout, moves, roles, parts))
    return buckets
