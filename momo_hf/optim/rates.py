"""The upper bounds of the coming step: what the schedule says, times the cap that a search has found."""

from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.record import Group, keep, scalar
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import SEARCH
from momo_hf.optim.steps.search import cap_of


class Rates:
    """α and λ of all groups. Options are kept as vectors on the device for as long as they stay what they are."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[float], Tensor]] = {}

    def of(self, groups: list[Group], option: str, like: Tensor) -> Tensor:
        """An option of all groups as a vector, without a read-back where it is a tensor.

        Args:
            groups: the parameter groups.
            option: its key.
            like: for dtype and device.
        """
        values = [group[option] for group in groups]
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

    def lr(self, groups: list[Group], ahead: int = 1) -> Tensor:
        """α_g, shape (groups,): a group's `lr`, or its share of the cap that was found.

        Args:
            groups: the parameter groups.
            ahead: 1 for the coming step, 0 for the last one.
        """
        step = MODEL.read(groups).step
        lr = self._undecayed(groups, self.of(groups, "lr", step))
        return lr * cap_of(SEARCH.read(groups), step + ahead) if SEARCH.stands_in(groups[0]) else lr

    def remember(self, groups: list[Group], ok: Tensor) -> None:
        """Remember the largest `lr`, also from the steps of a search, unless the step was dropped."""
        if follows_no_decay(groups):
            like = MODEL.read(groups).step
            highest, before = self._undecayed(groups, self.of(groups, "lr", like)), self.of(groups, "lr_max", like)
            entries = [(group, "lr_max") for group in groups]
            keep(entries, torch.where(ok & highest.isfinite(), highest, before).unbind())

    def _undecayed(self, groups: list[Group], lr: Tensor) -> Tensor:
        """The largest `lr` of every group so far, where it is averaged and `lr` is a share of a cap that was found.

        So a warmup acts, and the linear decay that is Trainer's default does not: an average needs none, and lost by it on
        most tasks.
        """
        return self.of(groups, "lr_max", lr).maximum(lr) if follows_no_decay(groups) else lr


def follows_no_decay(groups: list[Group]) -> bool:
    """Whether the iterates are averaged and the cap is found by a search."""
    head: dict[str, Any] = groups[0]
    return bool(head["averaging"]) and SEARCH.stands_in(head)
