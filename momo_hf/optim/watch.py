"""Says when a run stalls or steps are skipped, without making the host wait for the device."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


logger = logging.getLogger(__name__)

# Steps between two looks at the counters.
EVERY = 50


class Watch:
    """Compares the counters of an optimizer with what they were some steps before.

    Args:
        group: a parameter group whose counters are old news, as after loading a checkpoint.
    """

    def __init__(self, group: dict[str, Any] | None = None) -> None:
        self._calls = 0
        self._copy: tuple[Tensor, torch.Event] | None = None
        self._stalled, self._skipped = 0.0, 0.0
        if group:
            self._stalled, self._skipped, _ = counters_of(group).tolist()
        self._warned_of_stall = False

    def after_step(self, group: dict[str, Any]) -> None:
        """Note that a step was taken; now and then look at `stalled` and `skipped` of its group."""
        if torch.compiler.is_compiling():
            return
        self._calls += 1
        if self._calls % EVERY != 0 or _captures():
            return
        if self._copy is not None and self._copy[1].query():
            self._report(*self._copy[0].tolist())
            self._copy = None
        counters = counters_of(group)
        if counters.device.type == "cpu":
            self._report(*counters.tolist())
        elif self._copy is None:
            # The copy is read at the next look, when it has long arrived.
            event = torch.Event(counters.device.type)
            self._copy = (counters.to("cpu", non_blocking=True), event)
            event.record()

    def _report(self, stalled: float, skipped: float, fstar: float) -> None:
        zero, lost = stalled - self._stalled, skipped - self._skipped
        self._stalled, self._skipped = stalled, skipped
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        if zero > EVERY / 2 and not self._warned_of_stall:
            self._warned_of_stall = True
            logger.warning(
                f"The loss was at or below lb={fstar:g} on {zero:.0f} of the last {EVERY} steps, so MoMo's steps were 0 "
                "and training stalls. Give a lower `lb`: a number that the loss never falls below."
            )
        if lost > 0:
            logger.warning(
                f"MoMo skipped {lost:.0f} of the last {EVERY} steps because the loss, its clip factor or a gradient was "
                f"not finite ({skipped:.0f} in all); nothing was changed by them."
            )


def counters_of(group: dict[str, Any]) -> Tensor:
    """`stalled`, `skipped` and f* as one vector, on their device."""
    return torch.stack([group["stalled"], group["skipped"], group["fstar"]])


def _captures() -> bool:
    """Whether a CUDA graph is being captured, which cannot hold a look."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
