"""Which parameters a step updates alike, and by which kernels.

On a CPU, where Python's part of a step counts, the next step finds the plan again unless something has changed that went into
it. Elsewhere the host is ahead of the device, and a plan would keep memory from being freed that somebody has moved away, as
who offloads the state does.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.kernels.table import assign
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group
from momo_hf.optim.steps.kind import Kind
from momo_hf.optim.steps.movement import PLACE
from momo_hf.optim.tensors.buckets import Bucket, alike_groups, sort_into_buckets, values_of
from momo_hf.optim.tensors.sharding import Layout, has_dtensors


# Options that decide which groups are alike, and nothing else.
RATES = ("lr", "lr_max")

ON_CPU, GRAD, FORM, STRIDE = (
    attrgetter("is_cpu"),
    attrgetter("grad"),
    attrgetter("dtype", "layout"),
    methodcaller("stride"),
)


class Seen(NamedTuple):
    """What a plan depends on.

    Attributes:
        options: of every group, which of them are alike, and the strides of the parameters.
        gradients: of every parameter, whether it has one, and of which dtype; sparse ones have no plan.
        places: in memory, of parameters and state.
        tensors: these.
    """

    options: list[Any]
    gradients: list[Any]
    places: list[int]
    tensors: list[Tensor]

    def same(self, other: "Seen") -> bool:
        """Whether a plan for the one is a plan for the other."""
        return self[:3] == other[:3] and all(map(is_, self.tensors, other.tensors))


class Plan(NamedTuple):
    """A division of the parameters.

    Attributes:
        parts: every bucket and the kernel set that serves it.
        seen: what it depends on; None where it is made anew at every step.
    """

    parts: list[tuple[type[Kernels], Bucket]]
    seen: Seen | None

    def release(self) -> None:
        """Forget the gradients, which are others at the next step."""
        for _, bucket in self.parts if self.seen is not None else ():
            bucket.roles["grad"] = []


def plan_for(
    kind: Kind,
    groups: list[Group],
    params: list[Tensor],
    state: Mapping[Tensor, dict[str, Tensor]],
    methods: Mapping[str, Method],
    options: tuple[str, ...],
    layouts: list[Layout | None],
    others: int,
    finite_known: bool,
) -> Plan:
    """Make the plan of a step, or find the one of the step before, with the gradients of now.

    Args:
        kind: of the step, which keeps the plan.
        groups: the parameter groups.
        params: all parameters, in their order.
        state: per parameter.
        methods: by the names that groups have as their `method`.
        options: the keys of a group that decide how its parameters are updated.
        layouts: how each parameter is split over processes.
        others: see `sort_into_buckets`.
        finite_known: whether loss and gradients are known to be finite or not before the first pass.

    Raises:
        RuntimeError: a gradient is sparse or complex; a method needs whole parameters, and has flat parts of them.
    """
    alike = alike_groups(groups, options)
    seen = None
    if all(map(ON_CPU, params)) and not has_dtensors(params) and not any(layouts):
        names = (*(name for name in options if name not in RATES), "tables", "embeddings")
        values = [values_of(group, names) for group in groups]
        entries = chain.from_iterable(map(dict.values, state.values()))
        tensors = [*params, *(value for value in entries if isinstance(value, Tensor))]
        seen = Seen(
            [alike, others, finite_known, values, list(map(STRIDE, params))],
            [None if grad is None else FORM(grad) for grad in map(GRAD, params)],
            list(map(PLACE, tensors)),
            tensors,
        )
    plan: Plan | None = kind.plan
    if plan is not None and plan.seen is not None and seen is not None and plan.seen.same(seen):
        for _, bucket in plan.parts:
            bucket.roles["grad"] = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.roles["param"]]
        return plan
    buckets = sort_into_buckets(groups, state, methods, kind.roles, options, alike, layouts, others)
    if kind.moves_all:
        buckets = [replace(bucket, moves=True) for bucket in buckets]
    plan = Plan(assign(type(kind), buckets, finite_known), seen)
    kind.plan = plan if seen is not None else None
    return plan
