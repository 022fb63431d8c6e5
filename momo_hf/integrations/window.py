"""The loss and the clip factor that belong to the gradients of one optimizer."""

import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import ref

import torch
from accelerate import Accelerator
from torch import Tensor

from momo_hf.integrations import deepspeed
from momo_hf.integrations.average import Average
from momo_hf.integrations.gradients import Gradients, Groups, Snapshot, models_key, parameters_of
from momo_hf.optim import MomoOptimizer
from momo_hf.optim.intake import Given
from momo_hf.optim.tensors.sharding import layout_of, local, sum_over_shards, whole


logger = logging.getLogger(__name__)


class Sums(NamedTuple):
    """Losses that were backpropagated: kept by this process like their gradients, or averaged over processes."""

    local: Tensor | None = None
    averaged: tuple[Callable[[], Tensor], ...] = ()


def added(losses: Iterable[Tensor]) -> Tensor:
    """The sum of some losses, one at least."""
    return functools.reduce(torch.add, losses)


class LossAccumulator:
    """What was backpropagated into the gradients that an optimizer holds, and how they were scaled.

    It lives as long as these gradients: when they are dropped it is empty, and a step does not empty it, because
    gradients that nobody drops are used again. Sums that are not averaged over processes yet are kept apart from those
    that are, as gradients are.

    Args:
        optimizer: the MoMo optimizer itself, without wrappers.
    """

    def __init__(self, optimizer: MomoOptimizer) -> None:
        self.optimizer = optimizer
        self._accelerator: Callable[[], Accelerator | None] = lambda: None
        self._gradients: Gradients | None = None
        self.zero: Any = None  # ZeRO's optimizer, which holds the gradients itself and clips inside its step
        self._warned: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Forget everything: the gradients are gone."""
        self.sums = Sums()
        self._clips: dict[str, Tensor] = {}
        self._whole_norm = False  # whether the last clip saw all gradients, and nobody has written to them since
        self._snapshot: Snapshot | None = None
        self._fresh = self._used = False

    def connect(self, accelerator: Accelerator) -> None:
        """Say whose models the optimizer's parameters belong to."""
        self._accelerator = ref(accelerator)

    @property
    def gradients(self) -> Gradients | None:
        """The gradients, looked up anew where the Accelerator has got other models; None before it prepared anything."""
        accelerator, known = self._accelerator(), self._gradients
        if accelerator is not None and (known is None or known.key != models_key(accelerator, self.optimizer)):
            self._gradients = Gradients(accelerator, self.optimizer)
        return self._gradients

    def held(self) -> list[Tensor]:
        """The gradient tensors that there are now."""
        return [] if (gradients := self.gradients) is None else gradients.held()

    # ---- One lifetime with the gradients ----

    def settle(self, told: bool = False) -> None:
        """Drop what was dropped since the last look: all gradients are gone, or someone has set them to zero.

        Args:
            told: whether the user has said what else may have been done to the gradients.
        """
        if self._snapshot is None:
            return
        held = self.held()
        kept = self._snapshot.kept(held)
        self._whole_norm &= len(kept) == len(held)
        if not kept:
            self.clear()
        elif self._used or self._snapshot.written(kept):
            if not self._used and not told:
                self.warn_once(
                    "written",
                    "Gradients were written to after Accelerator.backward. MoMo takes zeroed ones for dropped, and their "
                    "loss with them. If you scaled them, say so by set_clip_factor(); if you added the gradient of another "
                    "loss, give the sum by set_loss().",
                )
            self._whole_norm = False
            left = self._any_left(kept)
            self._each(lambda loss: torch.where(left.to(loss.device), loss, 0.0))
            self._clips = {kind: torch.where(left.to(clip.device), clip, 1.0) for kind, clip in self._clips.items()}
            self._snapshot, self._used = Snapshot(held), False

    def remember(self, now: list[Tensor] | None = None) -> None:
        """Take the gradients as they are now for the ones that the loss belongs to."""
        if self.zero is None and not self.empty:
            self._snapshot = Snapshot(self.held() if now is None else now)

    def trust(self) -> None:
        """Do not look at the gradients again until `remember`: a loss scaler is about to write to them."""
        self.settle()
        self._snapshot = None

    @property
    def empty(self) -> bool:
        """Whether nothing was backpropagated into the gradients that there are."""
        return self.sums.local is None and not self.sums.averaged

    def _any_left(self, gradients: list[Tensor]) -> Tensor:
        """Whether any process has a gradient that is not 0; 0-dim, not read back."""
        parts = [part for part in map(local, gradients) if part.numel()]
        left = torch.zeros_like(self.optimizer.param_groups[0]["step"])
        for norm in torch._foreach_norm(parts, math.inf) if parts else []:
            left = left + (norm != 0).to(left)
        for layout in dict.fromkeys(layout_of(p, self.optimizer.shard_group) for p in parameters_of(self.optimizer)):
            left = sum_over_shards(left, layout)
        return left > 0

    def _fold(self, clip_factor: Tensor | float | None) -> None:
        """Scale the sums as the gradients were scaled; what is added from now on is not."""
        if clip_factor is not None:
            self._each(lambda loss: loss * torch.as_tensor(clip_factor).to(loss).clamp(max=1.0))
        self._clips = {}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the sum that is averaged and the one that is not."""
        local, averaged = self.sums
        if averaged:
            changed = change(added(part() for part in averaged))
            averaged = (lambda: changed,)
        self.sums = Sums(None if local is None else change(local), averaged)

    # ---- What goes in ----

    def add(self, own_loss: Tensor, averaged: Callable[[], Tensor] | None) -> None:
        """Take in a loss that was backpropagated, divided as its gradient was.

        Args:
            own_loss: the loss of this process, 0-dim.
            averaged: from `average`; None if this backward pass left the gradients with the process.
        """
        local = self.sum_with(own_loss) if averaged is None else None
        self._fold(self._clip_factor())
        self._whole_norm = False
        self.sums = Sums(local, self.sums.averaged if averaged is None else (*self.sums.averaged, averaged))
        self._fresh, self._used = True, False

    def sum_with(self, own_loss: Tensor) -> Tensor:
        """What a backward pass averages: its loss, and what was not averaged before, scaled as its gradient was."""
        if self.sums.local is None:
            return own_loss
        clip_factor = self._clip_factor()
        return own_loss + (self.sums.local if clip_factor is None else clip_factor.to(own_loss) * self.sums.local)

    def clip(self, parameters: list[Tensor], norm: Tensor, max_norm: float) -> None:
        """Note that gradients were clipped, if some of them are this optimizer's.

        Args:
            parameters: those that were clipped together.
            norm: their norm before, one element.
            max_norm: what it was clipped to.
        """
        if not parameters:
            self.warn_once(
                "empty clip",
                "clip_grad_norm_ got no parameters, so nothing was clipped. An iterator that was used before is empty: "
                "pass model.parameters(), or a list.",
            )
        covered = self._covered(parameters)
        if not any(covered) or not math.isfinite(max_norm):
            return
        self._whole_norm = all(covered)
        factor = (max_norm / (whole(norm).detach() + 1e-6)).clamp(max=1.0)
        if all(covered):
            self._clips["full"] = factor * self._clips.get("full", 1.0)
        else:
            self._clips["partial"] = factor.minimum(self._clips.get("partial", factor))
            self.warn_once(
                "partial clip",
                "clip_grad_norm_ was called for a part of the parameters. MoMo scales the loss by the smallest factor, "
                "which is safe but shortens the steps of the rest; clip all parameters in one call.",
            )

    def owns(self, parameters: list[Tensor]) -> bool:
        """Whether some of the gradients of these parameters are this optimizer's."""
        return any(self._covered(parameters))

    def _covered(self, parameters: list[Tensor]) -> list[bool]:
        among = set(map(id, parameters))
        return [id(p) in among for p in parameters_of(self.optimizer) if p.grad is not None]

    def warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    # ---- What comes out ----

    def __call__(
        self, loss: Tensor | float | None, clip_factor: Tensor | float | None, returned: Tensor | float | None
    ) -> Given:
        """The loss and the clip factor of the step that is about to be taken.

        Args:
            loss: given by hand on this process, or None; it wins over what was backpropagated.
            clip_factor: given by hand, or None; it wins too.
            returned: by a closure on this process, or None; it counts where nothing was backpropagated.

        Returns:
            The two, averaged over the processes over which the gradients were; None where there is none. And whether
            the clip factor comes from the norm of all gradients as they are.
        """
        self.settle(told=loss is not None or clip_factor is not None)
        whole_norm = False
        if clip_factor is None:
            clip_factor = self._clip_factor() if self.zero is None else deepspeed.clip_factor(self.zero)
            whole_norm = clip_factor is not None and (self._whole_norm or self.zero is not None)
        if loss is None and not self._fresh:
            loss = returned
        taken = self._backpropagated() if loss is None else self._averaged(loss)
        self._spend(clip_factor)
        # Parameters that FSDP keeps on the CPU take their scalars from there too.
        device = self.optimizer.param_groups[0]["step"].device
        return None if taken is None else taken.to(device), clip_factor, whole_norm

    def _backpropagated(self) -> Tensor | None:
        """The loss of the gradients that there are, unless a step has used it."""
        if not self._fresh:
            return None
        local, averaged = self.sums
        return added((*(part() for part in averaged), *(() if local is None else (local,))))

    def _averaged(self, given: Tensor | float) -> Tensor:
        """A loss of this process, averaged over the processes over which the gradients are."""
        like = self.optimizer.param_groups[0]["step"]
        # A number goes where the processes communicate, a tensor is there already.
        device = given.device if isinstance(given, Tensor) else like.device
        given = whole(given) if isinstance(given, Tensor) else given
        value = torch.as_tensor(given, dtype=like.dtype, device=device).reshape(1)
        groups = self.groups()
        return Average(value, groups).value(0) if groups else value

    def _spend(self, clip_factor: Tensor | float | None) -> None:
        """Gradients that nobody drops after the step stay with their loss."""
        if self.zero is not None or self.empty:
            self.clear()
        else:
            self._fold(clip_factor)
            self._fresh, self._used = False, True

    def groups(self) -> Groups:
        """The process groups over which a backward pass averages the gradients now."""
        if self.zero is not None:
            return (self.zero.dp_process_group,)
        return () if self.gradients is None else self.gradients.averaging()

    def _clip_factor(self) -> Tensor | None:
        return functools.reduce(torch.mul, self._clips.values()) if self._clips else None


def average(windows: list[LossAccumulator], own_loss: Tensor) -> list[Callable[[], Tensor] | None]:
    """Start to average a loss over the processes over which its backward pass is going to average the gradients.

    Args:
        windows: of all optimizers whose gradients it may go into.
        own_loss: the loss of this process, 0-dim.

    Returns:
        For every window a function that waits for the mean of `window.sum_with(own_loss)`; None where gradients, and so
        losses, stay with their process. One collective serves all windows with the same processes.
    """
    together: dict[tuple, list[int]] = {}
    for index, window in enumerate(windows):
        together.setdefault(window.groups(), []).append(index)
    found: list[Callable[[], Tensor] | None] = [None] * len(windows)
    for groups, members in together.items():
        if groups:
            mean = Average(torch.stack([windows[index].sum_with(own_loss) for index in members]), groups)
            for place, index in enumerate(members):
                found[index] = functools.partial(mean.value, place)
    return found
