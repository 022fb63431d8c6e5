"""Adam as a method: its second moment and its preconditioner."""

import torch
from torch import Tensor

from momo_hf.optim.method import Buffers, Method, Options
from momo_hf.optim.steps.model import debias


class Adam(Method):
    """Adam's preconditioner: v <- β2 v + (1-β2) g², D = sqrt(v / (1-β2^k)) + eps, u = D^{-1} d̂."""

    buffers = ("exp_avg_sq",)
    ramp_start = 1e-6
    table_bound, others_share = 2.0, 0.5  # chosen by runs, see configs/sweeps/README.md

    def update(self, grad: Tensor, buffers: Buffers, options: Options) -> Buffers:
        beta2 = options["betas"][1]
        return {"exp_avg_sq": (buffers["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)}  # v_k

    def direction(self, vector: Tensor, buffers: Buffers, options: Options) -> Tensor:
        root, correction, eps = buffers["exp_avg_sq"].sqrt(), options["rsqrt_correction2"], options["eps"]
        if torch.compiler.is_compiling():
            return vector / (root * correction + eps)
        return torch.div(vector, root.mul_(correction).add_(eps), out=root)  # D_k^{-1}, in one temporary

    def corrections(self, step: Tensor, options: Options) -> Buffers:
        return {"rsqrt_correction2": debias(options["betas"][1], step).rsqrt()}
