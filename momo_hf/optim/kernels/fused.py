"""MoMo-Adam's passes by torch's fused kernel of Adam, where the device has one."""

from itertools import chain

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.plain import Plain, standing
from momo_hf.optim.method import Method
from momo_hf.optim.model import debias


class FusedAdam(Plain):
    """Both passes are steps of Adam's kernel: the first one on copies of a piece, from 0 with lr -ρ, which ends at u."""

    @classmethod
    def take(cls, bucket: Bucket) -> tuple[Bucket, Bucket]:
        averages_from_0 = bucket.group["bias_correction"]
        fits = averages_from_0 and bucket.moves and bucket.device.type in _get_fused_kernels_supported_devices()
        return (bucket, bucket.empty) if fits else (bucket.empty, bucket)

    def __init__(self, method: type[Method], bucket: Bucket, weight: Tensor, step: Tensor) -> None:
        super().__init__(method, bucket, weight, step)
        self._count = step.to(torch.float32)  # the only dtype that the kernel takes on accelerators

    def products(self) -> Tensor:
        lr = -debias(self.bucket.options["betas"][0], self.step)
        zero, sums = torch.zeros_like(self.weight), []
        scratch = self.weight.new_empty(3, max((piece.numel for piece in self.pieces), default=0))
        views = scratch.unbind()
        for piece in self.pieces:
            # One call on copies is faster than seven without them; in one place, which stays in the cache.
            if views[0].numel() != piece.numel:
                views = scratch[:, : piece.numel].unbind()
            direction, momentum, second = views
            grad = piece.read("grad")
            piece.read("exp_avg", out=momentum)
            piece.read("exp_avg_sq", out=second)
            self._adam([direction.zero_()], [grad], [momentum], [second], lr)
            sample = zero
            if self.bucket.sampled:
                sample = torch.dot(grad, self.method.precondition(grad, {"exp_avg_sq": second}, self.options))
            overlap = torch.dot(momentum, piece.read("param")) if self.bucket.decays else zero
            sums += [torch.dot(momentum, direction), overlap, sample]
        return torch.stack(sums).view(-1, 3).sum(0) if sums else self.weight.new_zeros(3)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, sums = self.bucket, []
        # Adam's kernel takes MoMo-Adam's step when its lr is τρ: it divides by ρ.
        lr = factor * debias(bucket.options["betas"][0], self.step)
        found_inf = (~ok).to(torch.float32)
        before, after = 1 - decay, 1 + decay
        tensors = list(chain.from_iterable(bucket.roles.values()))
        as_they_are = {t.dtype for t in tensors} == {bucket.dtype} and all(map(Tensor.is_contiguous, tensors))
        for piece in self.pieces:
            tensors = piece.roles if as_they_are else {role: [piece.read(role)] for role in piece.roles}
            params, exp_avgs = tensors["param"], tensors["exp_avg"]
            if bucket.decays and not bucket.group["divide"]:
                torch._foreach_mul_(params, before)
            self._adam(params, tensors["grad"], exp_avgs, tensors["exp_avg_sq"], lr, found_inf)
            if bucket.decays and bucket.group["divide"]:
                torch._foreach_div_(params, after)
            if as_they_are:
                sums += standing(piece.read("exp_avg"), piece.read("param"), bucket.stored)
            else:
                sums += standing(exp_avgs[0], params[0], bucket.stored)
                for role in ("param", "exp_avg", "exp_avg_sq"):
                    piece.write(role, tensors[role][0])
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        return torch.stack(sums).view(-1, 2).sum(0) if sums else self.weight.new_zeros(2)

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
            [self._count] * len(params),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
