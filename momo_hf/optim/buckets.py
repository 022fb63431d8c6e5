"""Parameters that are updated alike, collected from all groups."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.sharding import Layout, dtensor_type, local, same_layout_gradient


# Options that every method has. A method is given only its own ones, which stay the same from step to step, so that a
# compiled pass is not compiled anew when the lr changes.
SHARED_BY_METHODS = (
    "lr", "weight_decay", "lb", "beta", "bias_correction", "use_fstar", "divide", "foreach", "compile",
    "averaging",
)  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Parameters of one device, dtype, layout and set of options, from one group or several.

    Attributes:
        index: of the first group they come from.
        group: that group.
        options: the method's own hyperparameters.
        layout: how the parameters are split over processes.
        moves: False where there is no gradient: the momentum decays, the parameter stays.
        start: the number of steps before their first gradient, 0-dim, where they joined a running model; else None.
        roles: the local tensors of "param", "grad", "exp_avg" and every buffer, in one order of parameters.
    """

    index: int
    group: dict[str, Any]
    options: dict[str, Any]
    layout: Layout | None
    moves: bool
    start: Tensor | None
    roles: dict[str, list[Tensor]]

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
    def empty(self) -> "Bucket":
        """The same without parameters."""
        return replace(self, roles={role: [] for role in self.roles})

    def split(self, chosen: Callable[[tuple[Tensor, ...]], bool]) -> "tuple[Bucket, Bucket]":
        """Two buckets: the parameters whose tensors (in the order of `roles`) are chosen, and the others."""
        parts: tuple[list, list] = ([], [])
        for row in zip(*self.roles.values()):
            parts[not chosen(row)].append(row)
        columns = (zip(*rows) if rows else ((),) * len(self.roles) for rows in parts)
        return tuple(replace(self, roles=dict(zip(self.roles, map(list, column)))) for column in columns)


def sort_into_buckets(
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    names: tuple[str, ...],
    options: tuple[str, ...],
    layouts: Iterable[Layout | None],
) -> list[Bucket]:
    """Collect the parameters of all groups that are updated alike, so that many small groups cost no more than one.

    It is done anew at every step: FSDP, accelerate and DeepSpeed exchange parameters behind the optimizer's back.

    Args:
        param_groups: the groups of the optimizer.
        state: its state per parameter.
        names: the entries of the state that the method works on.
        options: the keys of a group that decide how its parameters are updated.
        layouts: how each parameter is split over processes, in the order of the groups.

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    members: dict[tuple, list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]] = {}
    layouts, dtensor = iter(layouts), dtensor_type()
    first: dict[tuple, int] = {}
    for index, group in enumerate(param_groups):
        alike = tuple(tuple(v) if isinstance(v, list) else v for v in (group[name] for name in options))
        alike = first.setdefault(alike, index)  # a short key for what all these parameters share
        for p in group["params"]:
            layout, grad, entry = next(layouts), p.grad, state.get(p)
            if grad is None:
                if entry is None:
                    continue
            elif grad.is_sparse or grad.is_complex():
                kind, fix = ("sparse", "sparse=False") if grad.is_sparse else ("complex", "torch.view_as_real")
                raise RuntimeError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} is {kind}, which MoMo does not take: "
                    f"build the parameter with {fix}."
                )
            start = id(entry.get("start"))  # one tensor for all that joined together
            key = (alike, p.device, p.dtype, layout, isinstance(p, dtensor), grad is not None, start)
            alike_members = members.get(key)
            if alike_members is None:
                alike_members = members[key] = []
            alike_members.append((p, grad, entry))
    buckets = []
    for (index, _, _, layout, sharded, moves, _), rows in members.items():
        group = param_groups[index]
        params, grads, entries = map(list, zip(*rows))
        if not moves:
            grads = [torch.zeros_like(p) for p in params]
        elif sharded:
            grads = [same_layout_gradient(p, grad) for p, grad in zip(params, grads)]
        roles = {"param": params, "grad": grads} | {name: [entry[name] for entry in entries] for name in names}
        if sharded:
            roles = {role: [local(t) for t in tensors] for role, tensors in roles.items()}
        own = {name: group[name] for name in options if name not in SHARED_BY_METHODS}
        buckets.append(Bucket(index, group, own, layout, moves, entries[0].get("start"), roles))
    return buckets
