"""The state of an optimizer that belongs to no single step: made for new parameters, widened for new groups."""

from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor

from momo_hf.optim.auto import join_search
from momo_hf.optim.checks import check_one_model
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group, home_of, keep
from momo_hf.optim.steps.averaged import AVERAGES, Form, averages_of, interpolation_of
from momo_hf.optim.steps.iterates import first_iterates
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import SEARCH, first_origin
from momo_hf.optim.steps.search import new_search
from momo_hf.optim.tensors.buckets import method_of
from momo_hf.optim.tensors.sharding import local


State = MutableMapping[Tensor, dict[str, Tensor]]


def has_gradients(groups: list[Group]) -> bool:
    """Whether a parameter has a gradient."""
    return any(p.grad is not None for group in groups for p in group["params"])


def is_probe(groups: list[Group], state: State) -> bool:
    """Whether a step without a loss only asks for initialised state, as torch.distributed does: its gradients are 0."""
    if state:
        return False
    grads = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(g.any()) for g in grads)


def init_state(groups: list[Group], state: State, methods: Mapping[str, Method], searches: bool) -> None:
    """Make the state of parameters that have their first gradient.

    Args:
        groups: the parameter groups.
        state: per parameter.
        methods: of the optimizer.
        searches: whether the search for the cap goes on.
    """
    late: dict[str, Tensor] | None = None
    running, averages = bool(state) and not searches, bool(groups[0]["averaging"])
    for group in groups:
        for p in group["params"]:
            if p.grad is None or p in state:
                continue
            if late is None:
                # Parameters that join a running model share one count of the steps before; the others need none.
                late = {"start": groups[0]["step"].clone()} if running else {}
            dtype = torch.promote_types(p.dtype, torch.float32)
            method = method_of(group, methods)
            if searches:
                own, zeros = first_origin(p, method), method.buffers
            elif averages:
                own, zeros = first_iterates(p), averages_of(method)
            else:
                own, zeros = {}, ("exp_avg", *method.buffers)
            state[p] = own | {name: torch.zeros_like(p, dtype=dtype) for name in zeros} | late


def join(groups: list[Group], check: Callable[[Group], None], form: Form, stand_in: float) -> bool:
    """Make the last group, which was just added, one of the others.

    Args:
        groups: the parameter groups.
        check: raises for an option that is wrong.
        form: of the average, where nobody says otherwise.
        stand_in: what stands in `lr` while it is searched for.

    Returns:
        Whether a search for the cap begins with it.

    Raises:
        ValueError: an option is wrong, or not that of the others.
    """
    head, group, first = groups[0], groups[-1], len(groups) == 1
    begins = join_search(group, None if first else head, stand_in) and first
    check(group)
    group["averaging"] = interpolation_of(group["averaging"], form.interpolation)
    check_one_model(group, head)
    if begins:
        SEARCH.write(groups, new_search(torch.zeros((), device=home_of(groups))))
    if group["averaging"]:
        group["train_mode"] = head.get("train_mode", True)
        kept = form.kept()
        group.update(kept if first else {name: head[name] for name in kept})
    widen(groups)
    if first:
        group["fstar"] = torch.full_like(group["fstar"], group["lb"])
    return begins


def widen(groups: list[Group]) -> None:
    """Give every group the scalars of the first, in float64 if any parameter is in float64."""
    head = groups[0]
    wide = any(p.dtype == torch.float64 for group in groups for p in group["params"])
    dtype = torch.float64 if wide else torch.float32
    MODEL.widen(groups, dtype)
    if SEARCH.stands_in(head):
        SEARCH.widen(groups, dtype)
    if head["averaging"]:
        AVERAGES.widen(groups, dtype)
    for group in groups:
        if head["averaging"]:
            group.setdefault("lr_max", 0.0)
        group["effective_lr"] = group.get("effective_lr", torch.zeros((), device=home_of(groups))).to(dtype)


def show(groups: list[Group], factor: Tensor, ok: Tensor) -> None:
    """Write `effective_lr` for whoever logs; a skipped step leaves the one before it.

    Args:
        groups: the parameter groups.
        factor: the step sizes, shape (groups,), twice as long or 0-dim, see `cap.shares`. Of a group with embeddings that
            learn theirs is shown.
        ok: 0-dim bool, False on a skipped step.
    """
    entries = [(group, "effective_lr") for group in groups]
    if not isinstance(ok, Tensor):
        if ok:
            keep(entries, [*factor][: len(groups)])
        return
    factor = factor.narrow(0, 0, len(groups)) if factor.dim() else factor
    shown = torch.stack([group["effective_lr"].to(factor) for group in groups])
    keep(entries, torch.where(ok, factor, shown).unbind())
