"""What makes a MoMo method: its buffers, how a gradient enters them, and its preconditioner. Nothing about speed."""

from typing import Any

from torch import Tensor


class Method:
    """A momentum method in mathematics alone; MoMo on plain momentum where nothing is overridden.

    The momentum itself, d <- β d + (1-β) g, is the same for all methods and is not a buffer. The functions see flat
    tensors of at least float32, whatever the parameters are, and may be called for any part of a parameter.

    Attributes:
        buffers: the names of the method's own buffers, one tensor each per parameter.
        ramp_start: the size of the first step of a search for the cap (`lr="auto"`), about a ten thousandth of any that
            is good. None makes it from the first loss and gradient, which is right for a step that is proportional to the
            gradient; a method whose preconditioner takes the size out of the gradient has a number of its own.
    """

    buffers: tuple[str, ...] = ()
    ramp_start: float | None = None

    @staticmethod
    def update_buffers(grad: Tensor, buffers: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
        """Take a gradient into the method's buffers.

        Args:
            grad: flat, at least float32.
            buffers: the buffers by name, of the size and dtype of `grad`; not to be changed in place.
            options: the method's own hyperparameters, and what `corrections` gave.

        Returns:
            The new buffers by name.
        """
        return {}

    @staticmethod
    def precondition(vector: Tensor, buffers: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        """Return D_k^{-1} vector, from the buffers after `update_buffers`; D must be positive."""
        return vector

    @staticmethod
    def corrections(step: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        """Numbers that depend on the step k (0-dim) alone, for example bias corrections; they join the options."""
        return {}
