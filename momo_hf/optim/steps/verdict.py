"""How the host hears that a search is over, without waiting for the device, and what it says."""

import logging

import torch
import torch.distributed as dist

from momo_hf.optim.steps.search import FIRST, HARM, NOT_FINITE, NOTHING, OVERSHOOT, RAMP, STEPS, SearchState


logger = logging.getLogger(__name__)

WEAK_SIGNAL = "so the signal was weak and the cap is a cautious one. If the loss does not fall, give `lr`, or larger batches at first."
# What to say of a search by why it ended.
SEEN = {
    OVERSHOOT: (logging.INFO, "search: cap {cap} found after {steps} steps: longer ones overshoot."),
    RAMP: (
        logging.INFO,
        "search: cap {cap} found after {steps} steps, the whole ramp: no step of it was much too long.",
    ),
    HARM: (
        logging.WARNING,
        "search: cap {cap} taken after {steps} steps: gradients grew before it was clear which steps overshoot, "
        + WEAK_SIGNAL,
    ),
    NOT_FINITE: (
        logging.WARNING,
        "search: cap {cap} taken after {steps} steps: loss or gradients were not finite any more, " + WEAK_SIGNAL,
    ),
    NOTHING: (
        logging.WARNING,
        "search: cap {cap} taken after {steps} steps: the loss says too little about the step size, " + WEAK_SIGNAL,
    ),
}


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

    @property
    def cap(self) -> float:
        """What was found, after the last step."""
        return self._values.tolist()[1]

    def tell(self, shares: list[float]) -> None:
        """Say once what was seen and what was taken; on the first process. Where all went well it is no warning.

        Args:
            shares: what of the cap counts for whom, see `cap.shares`.
        """
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        ended, cap, steps = self._values.tolist()
        level, seen = SEEN[ended]
        beside = (
            f" This is the cap of embeddings; for all other parameters {shares[-1]:g} of it counts." if shares else ""
        )
        logger.log(level, seen.format(cap=f"{cap:.2g}", steps=f"{steps:.0f}") + beside)


def tell_start() -> None:
    """Say that a search begins; on the first process."""
    if not (dist.is_initialized() and dist.get_rank() > 0):
        logger.info(
            f"search: the first steps, {FIRST + 1} to {STEPS}, look for the cap of the step size; then the weights go back to "
            "where they began."
        )
