"""MoMo-Adam's passes by torch's fused kernel of Adam, where the device has one."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from momo_hf.optim import chunks
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, batches
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

    @cached_property
    def batches(self) -> list[list[Piece]]:
        """Pieces of one call of the kernel, which stay in the cache for what is computed with them next."""
        return list(batches(self.pieces, chunks.CPU_PIECE, lambda piece: piece.numel))

    def products(self) -> Tensor:
        lr = -debias(self.bucket.options["betas"][0], self.step)
        zero, sums = torch.zeros_like(self.weight), []
        sizes = [[piece.numel for piece in batch] for batch in self.batches]
        scratch = self.weight.new_empty(3, max(map(sum, sizes), default=0))
        for batch, numels in zip(self.batches, sizes):
            # One call on copies is faster than seven without them; in one place, which stays in the cache.
            direction, momentum, second = wholes = scratch[:, : sum(numels)].unbind()
            directions, momenta, seconds = (whole.split(numels) for whole in wholes)
            grads = [piece.read("grad") for piece in batch]
            direction.zero_()
            torch.cat([piece.read("exp_avg") for piece in batch], out=momentum)
            torch.cat([piece.read("exp_avg_sq") for piece in batch], out=second)
            self._adam(directions, grads, momenta, seconds, lr)
            sums += [torch.dot(momentum, direction), zero, zero]
            if self.bucket.decays:
                sums[-2] = torch.dot(momentum, join([piece.read("param") for piece in batch]))
            if self.bucket.sampled:
                grad = join(grads)
                sums[-1] = torch.dot(grad, self.method.precondition(grad, {"exp_avg_sq": second}, self.options))
        return torch.stack(sums).view(-1, 3).sum(0) if sums else self.weight.new_zeros(3)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, zero, sums = self.bucket, torch.zeros_like(self.weight), []
        # Adam's kernel takes MoMo-Adam's step when its lr is τρ: it divides by ρ.
        lr = factor * debias(bucket.options["betas"][0], self.step)
        found_inf = (~ok).to(torch.float32)
        before, after = 1 - decay, 1 + decay
        everything = list(chain.from_iterable(bucket.roles.values()))
        as_they_are = {t.dtype for t in everything} == {bucket.dtype} and all(map(Tensor.is_contiguous, everything))
        for batch in self.batches:
            if as_they_are:
                tensors = {role: list(chain.from_iterable(p.roles[role] for p in batch)) for role in bucket.roles}
            else:
                tensors = {role: [piece.read(role) for piece in batch] for role in bucket.roles}
            params, exp_avgs = tensors["param"], tensors["exp_avg"]
            if bucket.decays and not bucket.group["divide"]:
                torch._foreach_mul_(params, before)
            self._adam(params, tensors["grad"], exp_avgs, tensors["exp_avg_sq"], lr, found_inf)
            if bucket.decays and bucket.group["divide"]:
                torch._foreach_div_(params, after)
            for i, piece in enumerate(batch):
                if as_they_are:
                    sums += standing(piece.read("exp_avg"), piece.read("param"), bucket.stored, zero)
                    continue
                sums += standing(exp_avgs[i], params[i], bucket.stored, zero)
                for role in ("param", "exp_avg", "exp_avg_sq"):
                    piece.write(role, tensors[role][i])
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        return torch.stack(sums).view(-1, 2).sum(0) if sums else self.weight.new_zeros(2)

    def _adam(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
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


def join(flat: list[Tensor]) -> Tensor:
    return flat[0] if len(flat) == 1 else torch.cat(flat)
