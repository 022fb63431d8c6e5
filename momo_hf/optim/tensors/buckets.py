"""Parameters that are updated alike, collected from all groups."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from momo_hf.optim.method import Method
from momo_hf.optim.record import beta_of
from momo_hf.optim.tensors.chunks import Piece, pieces, stacks
from momo_hf.optim.tensors.gathered import Gathered, gathered, parts_of
from momo_hf.optim.tensors.sharding import Layout, dtensor_type, local, same_layout_gradient


# Options that every method has. A method is given only its own ones, which stay the same from step to step, so that a
# compiled pass is not compiled anew when the lr changes.
SHARED_BY_METHODS = (
    "lr", "weight_decay", "lb", "beta", "bias_correction", "use_fstar", "divide", "foreach", "compile",
    "averaging", "method", "lr_max",
)  # fmt: skip

Roles = dict[str, list[Tensor]]
T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """Parameters of one device, dtype, layout and set of options, from one group or several.

    Attributes:
        column: their entry in vectors that have one per group, or two, see `cap.shares`.
        group: the first one they come from.
        method: their method.
        options: the method's own hyperparameters.
        layout: how the parameters are split over processes.
        table: whether they are tables of embeddings, where that makes a difference.
        moves: False where there is no gradient: the momentum decays, the parameter stays.
        start: the number of steps before their first gradient, 0-dim, where they joined a running model; else None.
        roles: the local tensors of "param", "grad" and what the kind of step works on, in one order of parameters.
    """

    column: int
    group: dict[str, Any]
    method: Method
    options: dict[str, Any]
    layout: Layout | None
    table: bool
    moves: bool
    start: Tensor | None
    roles: Roles
    _made: dict[Callable[["Bucket"], Any], Any] = field(default_factory=dict)

    def made(self, make: "Callable[[Bucket], T]") -> T:
        """What a kernel set makes of the tensors, gradients apart: once, for as long as they stay what they are."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    @property
    def device(self) -> torch.device:
        return self.roles["param"][0].device

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.roles["param"][0].dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return torch.promote_types(self.stored, torch.float32)

    @property
    def decays(self) -> bool:
        return self.group["weight_decay"] != 0

    @property
    def beta(self) -> float:
        """β of the momentum."""
        return beta_of(self.group)

    @property
    def empty(self) -> "Bucket":
        """The same without parameters."""
        return replace(self, roles={role: [] for role in self.roles}, _made={})

    def pieces(self) -> list[Piece]:
        """All tensors, as the method can see them."""
        if isinstance(self.method, Gathered):
            return list(stacks(self.roles, self.dtype, self.method.shape, self.method.holders))
        if self.method.whole:
            return list(stacks(self.roles, self.dtype))
        return list(pieces(self.roles, self.dtype, self.group["foreach"] is not False))

    def split(self, chosen: Callable[[tuple[Tensor, ...]], bool]) -> "tuple[Bucket, Bucket]":
        """Two buckets: the parameters whose tensors (in the order of `roles`) are chosen, and the others."""
        mine: list[tuple[Tensor, ...]] = []
        others: list[tuple[Tensor, ...]] = []
        for row in zip(*self.roles.values()):
            (mine if chosen(row) else others).append(row)
        return self._of(mine), self._of(others)

    def _of(self, rows: list[tuple[Tensor, ...]]) -> "Bucket":
        columns = zip(*rows) if rows else ((),) * len(self.roles)
        return replace(self, roles=dict(zip(self.roles, map(list, columns))), _made={})


def sort_into_buckets(
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    methods: Mapping[str, Method],
    roles_of: Callable[[Method], tuple[str, ...]],
    options: tuple[str, ...],
    alike: list[int],
    layouts: Iterable[Layout | None],
    others: int = 0,
) -> list[Bucket]:
    """Collect the parameters of all groups that are updated alike, so that many small groups cost no more than one.

    Args:
        param_groups: the groups of the optimizer.
        state: its state per parameter.
        methods: by the name that a group has as its `method`; a group without a name has the first one.
        roles_of: the entries of a parameter's state that the step works on; where one is missing, it is the parameter.
        options: the keys of a group that decide how its parameters are updated.
        alike: from `alike_groups`.
        layouts: how each parameter is split over processes, in the order of the groups.
        others: how far the columns of parameters that are no embeddings stand behind those of embeddings.

    Raises:
        RuntimeError: a gradient is sparse or complex; a method needs whole parameters, and has flat parts of them.
    """
    members: dict[tuple, list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]] = {}
    layouts, dtensor = iter(layouts), dtensor_type()
    none: dict[str, Tensor] = {}
    learns: dict[int, int] = {}  # of the groups that are alike the first one with embeddings that have a state
    own = [method_of(group, methods) for group in param_groups]
    for index, group in enumerate(param_groups):
        like = alike[index]
        bounded = group["averaging"] and own[index].table_bound is not None
        tables, embeddings = group.get("tables", ()) if bounded else (), group.get("embeddings", ()) if others else ()
        for place, p in enumerate(group["params"]):
            layout, grad, entry = next(layouts), p.grad, state.get(p)
            if entry is None:
                if grad is None:
                    continue
                entry = none
            if grad is not None and (grad.is_sparse or grad.is_complex()):
                kind, fix = ("sparse", "sparse=False") if grad.is_sparse else ("complex", "torch.view_as_real")
                raise RuntimeError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} is {kind}, which MoMo does not take: "
                    f"build the parameter with {fix}."
                )
            start = id(entry.get("start"))  # one tensor for all that joined together
            parts = parts_of(p, own[index]) if layout is not None and own[index].whole else None
            key = (
                like,
                p.device,
                p.dtype,
                layout,
                dtensor and isinstance(p, dtensor),
                place in tables,
                learns.setdefault(like, index) if place in embeddings else like + others,
                grad is not None,
                start,
                parts,
            )
            alike_members = members.get(key)
            if alike_members is None:
                alike_members = members[key] = []
            alike_members.append((p, grad, entry))
    buckets = []
    for (index, _, _, layout, sharded, table, column, moves, _, parts), rows in members.items():
        group = param_groups[index]
        method = own[index] if parts is None else gathered(own[index], parts)
        grads = [torch.zeros_like(p) if grad is None else grad for p, grad, _ in rows]
        if sharded and moves:
            grads = [same_layout_gradient(p, grad) for (p, _, _), grad in zip(rows, grads)]
        roles = {"param": [p for p, _, _ in rows], "grad": grads}
        roles |= {role: [entry.get(role, p) for p, _, entry in rows] for role in roles_of(method)}
        if sharded:
            roles = {role: [local(t) for t in column] for role, column in roles.items()}
        its = {name: group[name] for name in options if name not in SHARED_BY_METHODS}
        joined = rows[0][2].get("start")
        buckets.append(Bucket(column, group, method, its, layout, table, moves, joined, roles))
    return buckets


def alike_groups(param_groups: list[dict[str, Any]], options: tuple[str, ...]) -> list[int]:
    """For every group the first one that has the same options."""
    first: dict[tuple[Any, ...], int] = {}
    return [first.setdefault(values_of(group, options), index) for index, group in enumerate(param_groups)]


def values_of(group: Mapping[str, Any], options: Iterable[str]) -> tuple[Any, ...]:
    """Some options of a group as they are now; None for those that it has not."""
    return tuple(tuple(v) if isinstance(v := group.get(name), list) else v for name in options)


def method_of(group: Mapping[str, Any], methods: Mapping[str, Method]) -> Method:
    """The method of a group's parameters."""
    return methods[group["method"]] if "method" in group else next(iter(methods.values()))
