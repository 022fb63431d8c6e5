"""The one way that a step of any kind goes: buckets, first pass, one sum over all shards, decision, second pass."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group, params_of
from momo_hf.optim.steps.given import Beginning, Given
from momo_hf.optim.steps.kind import Kind, Now
from momo_hf.optim.steps.model import debias
from momo_hf.optim.steps.plan import Plan, plan_for
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.sharding import Layout, layouts_of, sum_over_shards


def take_step(
    kind: Kind,
    groups: list[Group],
    state: Mapping[Tensor, dict[str, Tensor]],
    methods: Mapping[str, Method],
    options: tuple[str, ...],
    shard_group: dist.ProcessGroup | None,
    given: Given,
) -> Any:
    """Take one step.

    Args:
        kind: of the step.
        groups: the parameter groups.
        state: per parameter.
        methods: by the names that groups have as their `method`.
        options: the keys of a group that decide how its parameters are updated.
        shard_group: where plain tensors are parts of flat partitions (ZeRO): the processes that hold the others.
        given: what the step is given.

    Returns:
        What the kind decided.

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    params = params_of(groups)
    places = layouts_of(params, shard_group)
    layouts = layouts_in_order(params, places)
    known = is_known(given, places)
    others = len(given.lr) - len(groups)
    plan = plan_for(kind, groups, params, state, methods, options, places, others, known)
    try:
        return take_planned_step(kind, plan, groups, params, layouts, given, known)
    finally:
        plan.release()


def take_planned_step(
    kind: Kind,
    plan: Plan,
    groups: list[Group],
    params: list[Tensor],
    layouts: Mapping[Layout | None, bool],
    given: Given,
    known: bool,
) -> Any:
    """Take a step by a plan; `known` says whether this process knows before if loss and gradients are finite."""
    buckets = [bucket for _, bucket in plan.parts]
    norm = norm_of(given, buckets) if known else None
    beginning = kind.begin(groups, given, norm)
    beside = kind.beside(params, buckets, layouts, given.loss)
    kernels = [made(type(kind), bucket, now_of(kind, made, bucket, beginning, known)) for made, bucket in plan.parts]

    sums: dict[Layout | None, list[Tensor | None]] = {layout: [None] * len(given.lr) for layout in layouts}
    for part in kernels if not given.dropped else ():
        if part.bucket.moves:
            rows, column = sums[part.bucket.layout], part.bucket.column
            found, before = part.first().to(given.loss), rows[column]
            rows[column] = found if before is None else before + found
    totals, rest = sum_over_layouts(sums, beside, len(kind.SUMS))
    if given.dropped:
        totals = torch.full_like(totals, torch.nan)

    update = kind.decide(groups, given, beginning, totals, rest)
    left: dict[Layout | None, Tensor] = {}
    for part in kernels:
        bucket = part.bucket
        found = part.second(part.numbers(update))
        if kind.LEFT:
            layout, found = bucket.layout, found.to(given.loss)
            left[layout] = found + left[layout] if layout in left else found
    if kind.LEFT:
        left = {layout: left.get(layout, given.loss.new_zeros(len(kind.LEFT))) for layout in layouts}
    kind.finish(groups, params, left, layouts)
    return update


def layouts_in_order(params: list[Tensor], places: list[Layout | None]) -> dict[Layout | None, bool]:
    """Every layout of the model and whether parameters in it round; in the same order on all processes, also where a
    process has no gradient.
    """
    layouts: dict[Layout | None, bool] = {None: False}
    for layout, dtype in dict.fromkeys(zip(places, [p.dtype for p in params])):
        layouts[layout] = layouts.get(layout, False) or dtype.itemsize < 4
    return layouts


def is_known(given: Given, layouts: list[Layout | None]) -> bool:
    """Whether this process knows before the first pass if loss and gradients are finite; otherwise only all together do."""
    told = given.whole_norm and given.clip_factor is not None
    return not given.dropped and (told or not any(layouts))


def norm_of(given: Given, buckets: list[Bucket]) -> Tensor:
    """A number that is finite where the gradients are, 0-dim."""
    if given.whole_norm and given.clip_factor is not None:
        return given.clip_factor.reciprocal()  # the factor is 0 where the norm was infinite
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
    for bucket in buckets:
        if bucket.moves:
            alike.setdefault((bucket.device, bucket.stored, bucket.dtype), []).extend(bucket.roles["grad"])
    norms = [
        torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).sum().to(given.loss)
        for (_, _, dtype), grads in alike.items()
    ]
    return sum(norms[1:], norms[0]) if norms else torch.zeros_like(given.loss)


def now_of(kind: Kind, made: type[Kernels], bucket: Bucket, beginning: Beginning, finite_known: bool) -> Now:
    """The numbers of a step for a set of kernels and the parameters of a bucket."""
    step = made.number_for(bucket, beginning.step if bucket.start is None else beginning.step - bucket.start)
    weight = made.number_for(bucket, beginning.weight)
    inputs_valid = made.number_for(bucket, beginning.inputs_valid) if finite_known else None
    method, options = bucket.method, bucket.options
    if made.corrects:
        return Now(step, weight, None, options, inputs_valid)
    corrects = bucket.group["bias_correction"]
    correction = debias(bucket.beta, step).reciprocal() if corrects else None
    now = Now(step, weight, correction, options | method.corrections(step, options), inputs_valid)
    if not kind.looks_back:
        return now
    before = step - 1
    return now._replace(
        correction_before=debias(bucket.beta, before).reciprocal() if corrects else None,
        options_before=options | method.corrections(before, options),
    )


def sum_over_layouts(
    sums: Mapping[Layout | None, list[Tensor | None]], beside: Mapping[Layout | None, Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """The one sum over all shards.

    Args:
        sums: for every layout a row of `width` numbers per entry of `given.lr`, or None where this process has none.
        beside: for every layout a scalar.
        width: of the rows.

    Returns:
        The sums, shape (width, rows), and the sum of the scalars, 0-dim.
    """
    totals = []
    for layout, value in beside.items():
        rows = [value.new_zeros(width) if row is None else row for row in sums[layout]]
        totals.append(sum_over_shards(torch.cat([*rows, value.view(1)]), layout))
    total = sum(totals[1:], totals[0])
    rows, rest = total.split([len(total) - 1, 1])
    return rows.view(-1, width).T, rest.view(())
