"""MoMo on Muon: one model of the loss and one step size over Muon for matrices and Adam for all else."""

import logging
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from momo_hf.optim.adam import Adam
from momo_hf.optim.momo_adam import MomoAdam
from momo_hf.optim.muon import Muon


logger = logging.getLogger(__name__)


class MomoMuon(MomoAdam):
    """Muon for matrices and Adam for everything else, with one learning rate that adapts to the loss; `lr` is only its upper bound.

        d <- β1 d + (1-β1) g,    d̂ = d/ρ,    ρ = 1-β1^k
        u = 0.2 √max(rows, columns) polar(d̂)    where `method` is "muon"
        u = d̂ / (sqrt(v / (1-β2^k)) + eps)       where it is "adam"
        τ = min(lr, (f̂ + ĉ - lb)_+ / Σ <d̂, u>)
        x <- (x - τ u) / (1 + lr λ)

    At the cap (τ = lr) this is torch's Muon (without Nesterov momentum, its steps scaled to the size of Adam's) beside AdamW, so
    `lr` means what it means for AdamW. Muon alone is sensitive to its learning rate; bounded by the model of the loss it is
    not (Crawshaw, Modi, Liu, Gower 2025, arXiv 2510.09827, MuonAdam).

    `muon_groups(model)` makes the groups for a model. If no group has a `method`, all parameters are Adam's, and a warning says
    so.

    Matrices are processed whole. Under FSDP2, HSDP and tensor parallelism, matrices of one shape are exchanged so that every
    process computes the directions of some of them: every element of a matrix is sent twice in a step, in 4 bytes. Replicas
    (DistributedDataParallel) compute the same from the same gradients. Flattened parts of parameters (ZeRO, FSDP1) are
    refused.

    Args:
        params: parameter groups, such as those of `muon_groups`, or parameters; groups may differ in `lr`, `weight_decay` and
            `method`, which is "muon" or "adam" (the default).
        lr: as for `MomoAdam`, including `"auto"`.
        betas: β1 of the momentum and the averaged loss, and β2 of Adam's squared gradients. Default (0.9, 0.999).
        eps: Adam's eps. Default 1e-8.
        weight_decay: coefficient λ of the weight decay. Default 0.
        lb: a number that the loss never falls below. Default 0.
        divide: as for `MomoAdam`.
        use_fstar: as for `MomoAdam`.
        foreach: as for `MomoAdam`.
        compile: as for `MomoAdam`.
        averaging: as for `MomoAdam`, except that matrices step along the momentum of the gradients taken at y, and that True
            stands for 0.5, which puts y in the middle.

    State: for Adam's groups that of `MomoAdam`; for Muon's `exp_avg` (d), with averaging `ahead` beside it, and during a search
    the last direction of a matrix too.

    Raises:
        ValueError: an argument is out of range, or a parameter of Muon has fewer than two dimensions.

    Example:
        >>> optimizer = MomoMuon(muon_groups(model), lr="auto", averaging=True)
    """

    methods = {"adam": Adam(), "muon": Muon()}

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
            lr,
            betas,
            eps,
            weight_decay,
            lb,
            divide,
            use_fstar,
            foreach=foreach,
            compile=compile,
            averaging=averaging,
        )
        if not any(group["method"] == "muon" for group in self.param_groups):
            logger.warning(
                'MomoMuon: no parameter group has method="muon", so that all parameters are Adam\'s, as in MomoAdam. '
                "momo_hf.muon_groups(model) makes groups with the matrices of a model in Muon's, where it trains any; those of "
                "LoRA are Adam's."
            )

    def check_options(self, group: dict[str, Any]) -> None:
        super().check_options(group)
        flat = next((p for p in group["params"] if p.dim() < 2), None) if group.get("method") == "muon" else None
        if flat is not None:
            raise ValueError(
                f'`method` is "muon" for a parameter of shape {tuple(flat.shape)}, which is no matrix: put parameters of '
                'fewer than two dimensions into a group with method="adam". Flat parts of parameters (FSDP1, ZeRO) are not '
                "matrices either: train under FSDP2 or DistributedDataParallel."
            )
