"""How the host hears that a search is over, without waiting for the device, and what it says."""

import logging

import torch
import torch.distributed as dist

from momo_hf.optim.steps.search import NOTHING, REASONS, SearchState


logger = logging.getLogger(__name__)


class Verdict:
    """What a step of a search has decided, on its way to the host, which waits for it only when it reads.

    Args:
        state: after the step.
    """

    def __init__(self, state: SearchState) -> None:
        values = torch.stack([state.ended, state.cap, state.steps])
        self._values, self._event = values.to("cpu", non_blocking=True), None
        self._over: bool | None = None
        if values.device.type != "cpu":
            self._event = torch.Event(values.device.type)
            self._event.record(torch.accelerator.current_stream(values.device))

    def over(self) -> bool:
        """Whether the step was the last one of the search."""
        if self._over is None:
            if self._event is not None:
                self._event.synchronize()
            self._over = bool(self._values[0])
        return self._over

    def tell(self) -> None:
        """Say once what was found; on the first process."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        ended, cap, steps = self._values.tolist()
        if ended == NOTHING:
            logger.warning(
                f"search: nothing found in {steps:.0f} steps, so a cautious cap of {cap:.2g} was taken; the loss says too "
                "little about the step size. Give `lr` to choose it yourself."
            )
        else:
            logger.warning(f"search: cap {cap:.2g} found after {steps:.0f} steps ({REASONS[int(ended)]}).")
