"""The step of the paper: along the momentum, as far as the model of the loss goes."""

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor

from momo_hf.optim.buckets import Bucket, sort_into_buckets
from momo_hf.optim.model import with_drift
from momo_hf.optim.movement import Movement
from momo_hf.optim.passes import gradient_norm, inner_products, prepare, write
from momo_hf.optim.scalars import begin, next_step
from momo_hf.optim.sharding import Layout, layouts_of


class Modelling:
    """The part of an optimizer that takes the paper's step; the mathematics is in `model`, the passes over the parameters
    in `passes`.
    """

    param_groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, dict[str, Tensor]]
    _movement: Movement

    def _modelled_step(
        self, loss: Tensor, clip_factor: Tensor | None, whole_norm: bool, lr: Tensor, weight_decay: Tensor
    ) -> None:
        """Take one step.

        Args:
            loss: 0-dim, in the dtype of the scalars.
            clip_factor: κ, 0-dim, at most 1; or None.
            whole_norm: whether κ comes from the norm of all gradients as they are.
            lr: the caps α_g, shape (groups,).
            weight_decay: λ_g, shape (groups,).
        """
        state, group, params = self._model_state(), self.param_groups[0], self._params()
        beta, corrected = self._beta(group), group["bias_correction"]
        places = layouts_of(params, self.shard_group)
        layouts = self._layouts(params, places)
        buckets = sort_into_buckets(
            self.param_groups, self.state, ("exp_avg", *self.buffers), self._option_names(), places
        )
        norm = self._norm(clip_factor, whole_norm, buckets, layouts, loss)
        step, weight, usable = begin(
            state.step, loss, lr, weight_decay, clip_factor, norm, beta=beta, bias_correction=corrected
        )
        kernels = prepare(type(self), buckets, weight, step, None if norm is None else usable)
        strayed = self._movement.since_last_step(params, kernels, layouts, loss)
        dual_norm_sq, overlap, grad_norm_sq, strayed = inner_products(kernels, strayed, len(self.param_groups), step)
        state, update = next_step(
            state,
            loss,
            dual_norm_sq,
            overlap,
            grad_norm_sq,
            strayed,
            lr,
            weight_decay,
            usable,
            lb=group["lb"],
            beta=beta,
            bias_correction=corrected,
            use_fstar=group["use_fstar"],
            divide=group["divide"],
            clip_factor=clip_factor,
        )
        found = write(kernels, update, layouts, step)
        self._keep(with_drift(state, self._movement.after_step(params, found, layouts)))
        self._show(update)

    @staticmethod
    def _norm(
        clip_factor: Tensor | None,
        whole_norm: bool,
        buckets: list[Bucket],
        layouts: Iterable[Layout | None],
        like: Tensor,
    ) -> Tensor | None:
        """A number that is finite where the gradients are, 0-dim; None if only all processes together know."""
        if whole_norm:
            return clip_factor.reciprocal()  # the factor is 0 where the norm was infinite
        return gradient_norm(buckets, like) if all(layout is None for layout in layouts) else None
