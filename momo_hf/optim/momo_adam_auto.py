"""MoMo-Adam without a learning rate to choose."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from momo_hf.optim.momo_adam import MomoAdam


class MomoAdamAuto(MomoAdam):
    """MoMo-Adam with the slope of the samples and a lower bound that follows the loss; nothing has to be tuned.

    Each step aims at a fixed share κ = 1/4 of the averaged loss, which needs no knowledge of where the loss will end.
    The length of the step comes from the gradients of the samples instead of their average, so that noise shortens it.
    Both averages start at 0, but only the loss's is corrected for it, so the first steps are short, as in a warmup.
    A schedule of the learning rate acts on the share:

        q <- β1 q + (1-β1) <g, g / D>,    τ = min(lr / ρ, κ (lr / lr_0) (f̄ + c - ρ lb)_+ / q)

    It needs a loss that is positive and means something at 0 or at `lb`, as cross entropy and squared errors do.

    Args:
        params: parameters or parameter groups; groups may differ in `lr` and `weight_decay`.
        lr: upper bound α of the step size, before any schedule; leave it at its default, 1.
        betas: β1 of momentum, averaged loss and slope, β2 of the squared gradients. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: λ; as in AdamW it acts in proportion to the step size, here to that of the step before. Default 0.
        lb: lower bound of the loss. Default 0.
        divide: proximal decay (True) or AdamW's (False). Default True.
        foreach: as in torch.
        compile: run the passes over large parameters through `torch.compile`, where torch has no kernel that is as
            fast; the first step then takes some ten seconds. Default False.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> optimizer = MomoAdamAuto(model.parameters())
        >>> loss = loss_fn(model(x), y)
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lb: float = 0.0,
        divide: bool = True,
        *,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        options: dict[str, Any] = {"use_fstar": "share", "slope": "gradient", "foreach": foreach, "compile": compile}
        super().__init__(params, lr, betas, eps, weight_decay, lb, divide, **options)
