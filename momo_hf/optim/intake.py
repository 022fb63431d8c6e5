"""How the loss of a step reaches the optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.checks import check_loss


# Called at every step with the loss and the clip factor that were given by hand and with what a closure returned, each
# perhaps None; returns the loss and the clip factor of the step, and whether that factor comes from the norm of all
# gradients as they are now.
Given = tuple[Tensor | float | None, Tensor | float | None, bool]
LossSource = Callable[[Tensor | float | None, Tensor | float | None, Tensor | float | None], Given]


class LossIntake:
    """The part of an optimizer that takes the loss of the coming step and the factor that its gradients were clipped by."""

    param_groups: list[dict[str, Any]]
    _loss: Tensor | float | None = None
    _clip_factor: Tensor | float | None = None
    # Whoever keeps the loss of the gradients (the wiring of accelerate): asked at every step, see `LossSource`.
    loss_source: LossSource | None = None

    def set_loss(self, loss: Tensor | float) -> None:
        """Hand over the loss of the coming step: the one scalar whose gradient is in `p.grad`.

        It takes precedence over what was backpropagated: with a gradient cache, for example, the scalar given to `backward` is
        only a stand-in for the loss. On an optimizer that accelerate prepared, give the loss of this process, on every process;
        it is averaged over the processes as the gradients are. Without accelerate the optimizer does not know of other
        processes: under DistributedDataParallel or FSDP2 average the loss first,
        `dist.all_reduce(loss, op=dist.ReduceOp.AVG)` (gloo: sum and divide), or the replicas take steps of different sizes and
        drift apart. The loss is kept, even when gradients are zeroed, until a step uses it or `drop_loss` is called.

        Args:
            loss: a tensor with one element, of any shape and floating-point dtype, on a device of the parameters; or a Python
                number.

        Raises:
            ValueError: `loss` has more than one element, or is on a device that holds no parameter.
        """
        check_loss(loss, self.param_groups)
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    @property
    def has_loss(self) -> bool:
        """Whether a loss for the coming step was handed over."""
        return self._loss is not None

    def set_clip_factor(self, factor: Tensor | float) -> None:
        """Say by how much the gradients were scaled when you clipped them yourself: κ = max_norm / (norm + 1e-6).

        `Accelerator.clip_grad_norm_` does this by itself. Without it, a clipped gradient and an unclipped loss make a model that
        is no lower bound, and the steps come out too long.

        Args:
            factor: a number or a tensor with one element; values above 1 mean no clipping. A step with a factor that is
                negative or not a number is skipped.
        """
        self._clip_factor = factor

    def drop_loss(self) -> None:
        """Forget the loss and the clip factor of a step that will not be taken, for example because a loss scaler skips it.

        A search for the cap takes note: it ends when losses are not finite, or when too many steps are skipped.
        """
        self._loss = self._clip_factor = None

    @staticmethod
    def _evaluate(closure: Callable[[], Tensor | float], loss: Tensor | float | None) -> Tensor | float:
        """What a closure returns.

        Raises:
            TypeError: it is no function.
            ValueError: a loss is given beside it.
        """
        if not callable(closure):
            raise TypeError(
                f"step() takes a closure by position, got {type(closure).__name__}. Give the loss by name: "
                "step(loss=loss)."
            )
        if loss is not None:
            raise ValueError("step() takes `closure` or `loss`, got both: the closure already returns the loss.")
        with torch.enable_grad():
            return closure()

    def _take_loss(self, closure: Callable[[], Tensor | float] | None, loss: Tensor | float | None) -> Given:
        """The loss and the clip factor of this step: given by hand, or backpropagated, or returned by the closure; and
        whether the factor comes from the norm of all gradients, so that it says whether they are finite.
        """
        returned = None
        if loss is not None and closure is not None and self._loss is None:
            check_loss(loss, self.param_groups)
            returned = loss
        elif loss is not None and closure is None:
            self.set_loss(loss)
        given, clip_factor = self._loss, self._clip_factor
        self._loss = self._clip_factor = None
        if self.loss_source is not None:
            return self.loss_source(given, clip_factor, returned)
        return returned if given is None else given, clip_factor, False
