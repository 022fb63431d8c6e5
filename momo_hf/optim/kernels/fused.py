"""MoMo-Adam's passes by torch's fused kernel of Adam, where the device has one."""

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.plain import Plain, inner_product
from momo_hf.optim.model import debias


class FusedAdam(Plain):
    """Both passes are steps of Adam's kernel: the first one on copies of a piece, from 0 with lr -ρ, which ends at u."""

    @classmethod
    def take(cls, bucket: Bucket) -> tuple[Bucket, Bucket]:
        averages_from_0 = bucket.group["bias_correction"]
        fits = averages_from_0 and bucket.moves and bucket.device.type in _get_fused_kernels_supported_devices()
        return (bucket, bucket.empty) if fits else (bucket.empty, bucket)

    def products(self) -> Tensor:
        lr = -debias(self.bucket.options["betas"][0], self.step)
        zero, sums = torch.zeros_like(self.weight), []
        for piece in self.pieces:
            # One call on copies is faster than seven without them.
            grad, momentum, second = (piece.read(r, copy=r != "grad") for r in ("grad", "exp_avg", "exp_avg_sq"))
            direction = torch.zeros_like(grad)
            self._adam([direction], [grad], [momentum], [second], lr)
            sample = zero
            if self.bucket.sampled:
                sample = inner_product(grad, self.method.precondition(grad, {"exp_avg_sq": second}, self.options))
            overlap = inner_product(momentum, piece.read("param")) if self.bucket.decays else zero
            sums += [inner_product(momentum, direction), overlap, sample]
        return torch.stack(sums).view(-1, 3).sum(0) if sums else self.weight.new_zeros(3)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> None:
        roles = self.bucket.roles
        dtype = self.bucket.dtype
        if not all(t.dtype == dtype and t.is_contiguous() for tensors in roles.values() for t in tensors):
            return super().write(factor, decay, ok)
        params, divide = roles["param"], self.bucket.group["divide"]
        # Adam's kernel takes MoMo-Adam's step when its lr is τρ: it divides by ρ.
        lr = factor * debias(self.bucket.options["betas"][0], self.step)
        if self.bucket.decays and not divide:
            torch._foreach_mul_(params, 1 - decay)
        self._adam(params, roles["grad"], roles["exp_avg"], roles["exp_avg_sq"], lr, found_inf=(~ok).to(torch.float32))
        if self.bucket.decays and divide:
            torch._foreach_div_(params, 1 + decay)
        torch.autograd.graph.increment_version(params)  # a fused kernel does not

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        lr: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """Torch's fused kernel of Adam without decay, in place; everything stays as it was where `found_inf` is 1."""
        beta1, beta2 = self.bucket.options["betas"]
        torch._fused_adam_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [self.step.to(torch.float32)] * len(params),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
