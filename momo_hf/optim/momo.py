"""MoMo: a Polyak-type learning rate for SGD with momentum (paper, algorithm 1)."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from momo_hf.optim.optimizer import MomoOptimizer


class Momo(MomoOptimizer):
    """SGD with momentum whose learning rate adapts to the loss; `lr` is only its upper bound.

    The step along the averaged gradient d minimises a model of the averaged loss that is truncated at the lower bound:

        d <- β d + (1-β) g,    f̄ <- β f̄ + (1-β) f,    d̂ = d/ρ,    f̂ = f̄/ρ,    ĉ = c/ρ
        τ = min(lr, (f̂ + ĉ - lb)_+ / |d̂|²)
        x <- (x - τ d̂) / (1 + lr λ)

    ρ is 1, or 1-β^k with `bias_correction`. With `averaging` it is schedule-free, see `momo_hf.optim.steps.averaged`.

    Args:
        params: parameters or parameter groups; groups may differ in `lr` and `weight_decay`.
        lr: upper bound α of the step size; schedulers act on it. With `"auto"` the first steps find it, see
            `momo_hf.optim.auto`. Default 1.0.
        weight_decay: coefficient λ of the proximal weight decay. Default 0.
        beta: momentum β in [0, 1). Default 0.9.
        lb: a number that the loss never falls below. Default 0.
        bias_correction: whether the averages start at 0 and are corrected for it (True), or start at the first gradient
            and loss (False). Default False.
        use_fstar: whether to estimate the lower bound online, by the paper's rule; it never falls below `lb`. Default
            False.
        foreach: as in torch, whether to update small tensors together. `None` (default) and True do; False takes one tensor
            at a time.
        compile: whether to run the passes over large parameters through `torch.compile`, where torch has no kernel that is
            as fast; the first step then takes about ten seconds. Default False.
        averaging: whether to average the iterates and to evaluate and save the average, with `train()` and
            `eval()`; the largest `lr` so far counts. A number in (0, 1) is the weight of the average in the point where
            gradients are taken; True stands for 0.7. Default False.

    State: per parameter `exp_avg` (d; with averaging `ahead`, which is z - y, in its place), of at least float32; in every parameter
    group the scalars of `momo_hf.optim.steps.model.ModelState`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> optimizer = Momo(model.parameters(), lr=1.0)
        >>> loss = loss_fn(model(x), y)
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | str = 1.0,
        weight_decay: float = 0.0,
        beta: float = 0.9,
        lb: float = 0.0,
        bias_correction: bool = False,
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
                "weight_decay": weight_decay,
                "beta": beta,
                "lb": lb,
                "bias_correction": bias_correction,
                "use_fstar": use_fstar,
                "foreach": foreach,
                "compile": compile,
                "averaging": averaging,
            },
        )
