"""What makes a MoMo method: its buffers, how a gradient enters them, and the direction. Nothing about speed."""

from typing import Any

import torch
from torch import Tensor


Buffers = dict[str, Tensor]
Options = dict[str, Any]


class Method:
    """The mathematics of a momentum method. Without overrides it is plain momentum, which makes MoMo on SGD.

    The momentum itself, d <- β d + (1-β) g, is the same for all methods and is not one of the buffers. A method has no state of
    its own, and one object serves all parameters. Its functions receive flat tensors of at least float32, whatever the dtype of
    the parameters, and may be called for any part of a parameter; with `whole` they receive stacks of whole parameters.

    Attributes:
        buffers: the names of the method's own buffers, one tensor each per parameter.
        whole: whether `direction` needs parameters in their own shape, for example because it works on matrices. All functions
            then receive stacks of parameters of one shape, (parameters, *shape).
        costly: whether `direction` is expensive, so that a step computes it once and keeps it, which takes as much memory as
            the parameters.
        keeps_momentum: whether a step that averages the iterates uses the momentum too, that of the gradients at y. If not, it
            goes along the gradient, which is enough where the direction is linear in it: the averaging itself smooths. How
            an optimizer averages depends on whether any of its methods has it, see `momo_hf.optim.steps.averaged`.
        ramp_start: the size of the first step of a search for the cap (`lr="auto"`), about a ten-thousandth of any good step
            size. With None it is computed from the first loss and gradient, which is right where the step is proportional to
            the gradient; a method whose direction does not grow with the gradient needs a number of its own.
        table_bound: the largest absolute value of an entry of u in a step that averages the iterates, for the `tables` of
            a group, see `momo_hf.optim.steps.averaged`. With None there is no bound.
        others_share: what of a cap that was found counts for parameters that are no embeddings, in an optimizer that averages along
            gradients and learns embeddings too, see there.
    """

    buffers: tuple[str, ...] = ()
    whole: bool = False
    costly: bool = False
    keeps_momentum: bool = False
    ramp_start: float | None = None
    table_bound: float | None = None
    others_share: float = 1.0

    def update(self, grad: Tensor, buffers: Buffers, options: Options) -> Buffers:
        """Take a gradient into the method's buffers.

        Args:
            grad: flat, or a stack with `whole`; at least float32.
            buffers: the buffers by name, of the shape and dtype of `grad`; not to be changed in place.
            options: the method's own hyperparameters, and what `corrections` gave.

        Returns:
            The new buffers by name.
        """
        return {}

    def direction(self, vector: Tensor, buffers: Buffers, options: Options) -> Tensor:
        """Return u, the direction of a step, which goes to x - τ u.

        Args:
            vector: d̂ = d/ρ, the momentum corrected for its start at 0; or a gradient. Not to be changed in place.
            buffers: the buffers after `update`.
            options: as for `update`.

        Returns:
            u, a new tensor or `vector` itself; `<vector, u>` must not be negative. Where D^{-1} is a preconditioner that
            is D^{-1} d̂.
        """
        return vector

    def sample(self, grad: Tensor, momentum: Tensor, buffers: Buffers, options: Options) -> Tensor:
        """`<g, D^{-1} g>`, 0-dim: how a search sees that its steps do harm, because the gradients grow.

        Args:
            grad: as for `update`.
            momentum: d̂.
            buffers: the buffers after `update`.
            options: as for `update`.
        """
        return torch.dot(grad.flatten(), self.direction(grad, buffers, options).flatten())

    def corrections(self, step: Tensor, options: Options) -> Buffers:
        """Numbers that depend on the step k (0-dim) alone, for example bias corrections; they join the options."""
        return {}
