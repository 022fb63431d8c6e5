"""The upper bounds of the coming step: what the schedule says, and after a search what of the cap counts, see `cap`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.record import Group, keep, scalar
from momo_hf.optim.steps.arithmetic import for_formulas, where
from momo_hf.optim.steps.cap import fall, shares, warmup, whole_until
from momo_hf.optim.steps.given import settings_of
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import SEARCH


State = Mapping[Tensor, Any]


class Rates:
    """α and λ of all groups. Options are kept as vectors on the device for as long as they stay what they are.

    With averaging the largest `lr` so far counts, `lr_max`, those of the steps of a search and of dropped steps included. So a
    warmup acts, and a decay, as the linear one that is Trainer's default, does not: an average needs none, and lost by it on
    most tasks.

    Args:
        others: what of a cap that was found counts beside embeddings, see `cap.shares`.
    """

    def __init__(self, others: float) -> None:
        self._others = others
        self._kept: dict[str, tuple[list[float], Tensor]] = {}
        self._taken: Tensor | None = None
        self._until: tuple[float, Tensor] | None = None

    def decays(self, groups: list[Group], lr: Tensor) -> Tensor:
        """λ of all groups beside their α, without a read-back where it is a tensor."""
        values = [group["weight_decay"] for group in groups]
        return self._vector("weight_decay", values * (len(lr) // len(groups)), lr)

    def _of(self, groups: list[Group], option: str, like: Tensor) -> Tensor:
        return self._vector(option, [group[option] for group in groups], like)

    def _vector(self, option: str, values: Tensor | list[Any], like: Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([scalar(value, like) for value in values])
        kept = self._kept.get(option)
        if kept is None or kept[0] != values or kept[1].device != like.device or kept[1].dtype != like.dtype:
            if len(set(values)) == 1:  # then nothing has to be copied to the device
                made = like.new_full((len(values),), values[0])
            else:
                made = torch.tensor(values, dtype=like.dtype, device=like.device)
            self._kept[option] = kept = (values, made)
        return kept[1]

    def shares(self, groups: list[Group], state: State) -> list[float]:
        """`cap.shares` of these groups."""
        return shares(groups, state, self._others)

    def coming(self, groups: list[Group], state: State, searching: bool) -> Tensor:
        """α_g of the coming step, shape (groups,), or twice as long where `shares` has two numbers a group. What is the
        largest `lr` from then on is remembered.

        Args:
            groups: the parameter groups.
            state: per parameter.
            searching: whether the step is one of a search, which has sizes of its own.
        """
        like = MODEL.first(groups)
        lr = self._in_force(groups, like)
        if groups[0]["averaging"] and isinstance(lr, Tensor):
            before = self._of(groups, "lr_max", like)
            largest = torch.where(lr < math.inf, lr.maximum(before), before)  # not where it is not a number
            keep([(group, "lr_max") for group in groups], largest.unbind())
        elif groups[0]["averaging"]:
            for group, value in zip(groups, lr):
                group["lr_max"] = value if group["lr_max"] <= value < math.inf else group["lr_max"]
        return self._vector("lr", lr, like) if searching else self._after_search(groups, state, lr, like, 1)

    def taken(self, groups: list[Group], state: State) -> Tensor:
        """α_g of the last step that was taken, shaped as in `coming`; after a load what it would be now."""
        if self._taken is not None:
            return self._taken
        like = MODEL.first(groups)
        return self._after_search(groups, state, self._in_force(groups, like), like, 0)

    def _after_search(
        self, groups: list[Group], state: State, lr: Tensor | list[float], like: Tensor, ahead: int
    ) -> Tensor:
        rates = self._vector("lr", lr, like)
        if not SEARCH.stands_in(groups[0]):
            return rates
        counts = self.shares(groups, state)
        if counts:
            rates = torch.cat([rates, rates]) * self._vector("shares", counts, like)
        search, settings, kept = SEARCH.read(groups), settings_of(groups[0]), self._until
        if kept is None or kept[0] != settings.lb or kept[1].device != like.device or kept[1].dtype != like.dtype:
            self._until = kept = (settings.lb, whole_until(search, settings.lb))
        records = kept[1], MODEL.read(groups), search.steps, settings
        until, model, steps, settings = for_formulas(like, *records)
        return rates * warmup(steps, model.step + ahead) * fall(until, model, settings)

    def _in_force(self, groups: list[Group], like: Tensor) -> Tensor | list[float]:
        """What counts of `lr`: found on the host where that is numbers, so that it costs nothing on the device.

        Where a number is negative, infinite or NaN, it stays so for the step to see.
        """
        values = [group["lr"] for group in groups]
        if any(isinstance(value, Tensor) for value in values):
            lr = self._of(groups, "lr", like)
            if not groups[0]["averaging"]:
                return lr
            for group in groups:
                if not isinstance(group["lr_max"], Tensor):
                    group["lr_max"] = scalar(group["lr_max"], like)
            return torch.where(lr < 0, lr, lr.maximum(self._of(groups, "lr_max", like)))
        if not groups[0]["averaging"]:
            return values
        for group in groups:
            if isinstance(group["lr_max"], Tensor):
                group["lr_max"] = float(group["lr_max"])
        return [max(lr, group["lr_max"]) if lr >= 0 else lr for lr, group in zip(values, groups)]

    def took(self, lr: Tensor, ok: Tensor) -> None:
        """Note what a step was bounded by.

        Args:
            lr: as `coming` gave it.
            ok: 0-dim bool, False where the step was dropped.
        """
        if self._taken is None or self._taken.shape != lr.shape:
            self._taken = lr
        elif lr is not self._taken:
            self._taken = where(ok, lr, self._taken)
