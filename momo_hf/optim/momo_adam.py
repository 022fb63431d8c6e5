"""MoMo-Adam: the same step size over Adam's preconditioner (paper, algorithm 2)."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from momo_hf.optim.adam import Adam
from momo_hf.optim.checks import check_range
from momo_hf.optim.optimizer import MomoOptimizer


class MomoAdam(MomoOptimizer):
    """Adam whose learning rate adapts to the loss; `lr` is only its upper bound.

        d <- β1 d + (1-β1) g,    v <- β2 v + (1-β2) g²,    f̄ <- β1 f̄ + (1-β1) f
        d̂ = d/ρ,    f̂ = f̄/ρ,    ĉ = c/ρ,    ρ = 1-β1^k
        D = sqrt(v / (1-β2^k)) + eps,    u = d̂ / D
        τ = min(lr, (f̂ + ĉ - lb)_+ / <d̂, u>)
        x <- (x - τ u) / (1 + lr λ)

    At the cap (τ = lr) this is Adam's own step, so `lr` means what it means for AdamW.

    With `averaging` it is schedule-free, see `momo_hf.optim.steps.averaged`. At the cap it is then schedule-free AdamW, with r = 3.

    Args:
        params: parameters or parameter groups; groups may differ in `lr` and `weight_decay`.
        lr: upper bound α of the step size; schedulers act on it. The default, 1e-2, is for training from scratch; to
            fine-tune a pretrained model, give the lr that you would give AdamW. With `"auto"` the first steps find it, see
            `momo_hf.optim.auto`.
        betas: β1 of the momentum and the averaged loss, and β2 of the squared gradients, both in [0, 1). Default (0.9,
            0.999).
        eps: term added to the root of the second moment. Default 1e-8.
        weight_decay: coefficient λ of the weight decay. Default 0.
        lb: a number that the loss never falls below. Default 0.
        divide: proximal decay `/ (1 + lr λ)` (True) or AdamW's `(1 - lr λ) x` (False). Default True.
        use_fstar: whether to estimate the lower bound online, by the paper's rule; it never falls below `lb`. Default
            False.
        foreach: as in torch, whether to update small tensors together. `None` (default) and True do; False takes one tensor
            at a time.
        compile: whether to run the passes over large parameters through `torch.compile`, where torch has no kernel that is
            as fast; the first step then takes about ten seconds. Default False.
        averaging: whether to average the iterates and to evaluate and save the average, with `train()` and
            `eval()`; the largest `lr` so far counts. A number in (0, 1) is the weight of the average in the point where
            gradients are taken; True stands for 0.7. Default False.

    State: per parameter `exp_avg` (d; with averaging `ahead`, which is z - y, in its place) and `exp_avg_sq` (v), of at least float32;
    in every parameter group the scalars of `momo_hf.optim.steps.model.ModelState`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> optimizer = MomoAdam(model.parameters(), lr=1e-2)
        >>> loss = loss_fn(model(x), y)
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
    """

    methods = {"adam": Adam()}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | str = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lb: float = 0.0,
        divide: bool = True,
        use_fstar: bool = False,
        *,
        foreach: bool | None = None,
        compile: bool = False,
        averaging: bool | float = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "lb": lb,
                "divide": divide,
                "use_fstar": use_fstar,
                "foreach": foreach,
                "compile": compile,
                "averaging": averaging,
            },
        )

    def check_options(self, group: dict[str, Any]) -> None:
        super().check_options(group)
        check_range("betas[1]", group["betas"][1], 0.0, 1.0, "[0, 1)")
        check_range("eps", group["eps"], 0.0, float("inf"), "[0, inf)")
