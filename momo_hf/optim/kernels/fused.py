"""The passes by torch's fused kernels of SGD and Adam, on a CPU.

Both kernels leave everything as it is where `found_inf` is 1, so that a skip costs nothing.
"""

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from momo_hf.optim import chunks
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, batches
from momo_hf.optim.kernels.plain import Plain, standing
from momo_hf.optim.model import debias


# The largest β2 below 1. Adam's kernel with this β2, and with d for a gradient, does not change d and v by a bit: the
# average of d and d is d, and what d² adds to v rounds away.
ALMOST_1 = 1 - 2**-53


# One for every thread.
_kept = threading.local()


class Fused(Plain):
    """What the two sets share: lists of tensors that stay in the cache between the calls of a pass."""

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        fits = known and bucket.moves and not bucket.sampled and bucket.device.type == "cpu"
        return (bucket, bucket.empty) if fits and bucket.dtype == torch.float32 else (bucket.empty, bucket)

    @cached_property
    def batches(self) -> list[list[Piece]]:
        """Pieces of one call of a kernel, which stay in the cache for what is computed with them next."""
        return list(batches(self.pieces, chunks.CPU_PIECE, lambda piece: piece.numel))

    @cached_property
    def as_they_are(self) -> bool:
        """Whether a kernel can work on the tensors themselves."""
        everything = list(chain.from_iterable(self.bucket.roles.values()))
        return {t.dtype for t in everything} == {self.bucket.dtype} and all(map(Tensor.is_contiguous, everything))

    def lists(self, batch: list[Piece], roles: Sequence[str]) -> dict[str, list[Tensor]]:
        """The tensors of a batch by role, or copies that a kernel can work on; `put_back` is for these."""
        if self.as_they_are:
            return {role: list(chain.from_iterable(piece.roles[role] for piece in batch)) for role in roles}
        return {role: [piece.read(role) for piece in batch] for role in roles}

    def put_back(self, batch: list[Piece], tensors: dict[str, list[Tensor]], roles: Sequence[str]) -> None:
        if not self.as_they_are:
            for role in roles:
                for piece, tensor in zip(batch, tensors[role]):
                    piece.write(role, tensor)

    def join(self, batch: list[Piece], tensors: dict[str, list[Tensor]], role: str, row: int) -> Tensor:
        """The role as one flat tensor, from `lists`; a copy is made in a row of the workspace."""
        if not self.as_they_are:
            flat = tensors[role]
            return flat[0] if len(flat) == 1 else torch.cat(flat)
        if len(batch) == 1:
            return batch[0].read(role, out=workspace(row, batch[0].numel))
        out, start = workspace(row, sum(piece.numel for piece in batch)), 0
        for piece in batch:
            part = out[start : start + piece.numel]
            if (flat := piece.read(role, out=part)) is not part:
                part.copy_(flat)
            start += piece.numel
        return out

    def joined(self, batch: list[Piece], tensors: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """d and x as flat tensors."""
        return self.join(batch, tensors, "exp_avg", 0), self.join(batch, tensors, "param", 1)

    def take_in(self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor) -> Tensor:
        """Write momentum and buffers of a batch; <d, u>."""
        raise NotImplementedError

    def move(self, tensors: dict[str, list[Tensor]], factor: Tensor, found_inf: Tensor) -> None:
        """x <- x - factor u for a batch."""
        raise NotImplementedError

    def products(self) -> Tensor:
        zero, sums = torch.zeros_like(self.weight), []
        found_inf = self.usable.logical_not().to(torch.float32)
        averages = ("exp_avg", *self.method.buffers)
        for batch in self.batches:
            tensors = self.lists(batch, ("grad", *averages, *(("param",) if self.bucket.decays else ())))
            norm, overlap = self.take_in(batch, tensors, found_inf), zero
            if self.bucket.decays:
                overlap = torch.dot(*self.joined(batch, tensors))
            self.put_back(batch, tensors, averages)
            sums += [norm, overlap, zero, zero]
        return torch.stack(sums).view(-1, 4).sum(0) if sums else self.weight.new_zeros(4)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, zero, sums = self.bucket, torch.zeros_like(self.weight), []
        found_inf, before, after = ok.logical_not().to(torch.float32), 1 - decay, 1 + decay
        for batch in self.batches:
            tensors = self.lists(batch, ("param", "exp_avg", *self.method.buffers))
            if bucket.decays and not bucket.group["divide"]:
                torch._foreach_mul_(tensors["param"], before)
            self.move(tensors, factor, found_inf)
            if bucket.decays and bucket.group["divide"]:
                torch._foreach_div_(tensors["param"], after)
            momentum, param = self.joined(batch, tensors)
            sums += standing(momentum, param, bucket.stored, zero)
            self.put_back(batch, tensors, ("param",))
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        return torch.stack(sums).view(-1, 2).sum(0) if sums else self.weight.new_zeros(2)


class FusedMomentum(Fused):
    """MoMo by SGD's kernel, which with a decay of -1 and a lr of -(1-β) is an average: d + (1-β) (g - d)."""

    def take_in(self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor) -> Tensor:
        sgd(tensors["exp_avg"], tensors["grad"], -self.weight, found_inf, weight_decay=-1.0)
        momentum = self.join(batch, tensors, "exp_avg", 0)
        return torch.dot(momentum, momentum)

    def move(self, tensors: dict[str, list[Tensor]], factor: Tensor, found_inf: Tensor) -> None:
        sgd(tensors["param"], tensors["exp_avg"], factor, found_inf)


class FusedAdam(Fused):
    """MoMo-Adam by Adam's kernel: the first pass from 0 with lr -ρ, which ends at u; the second one with `ALMOST_1`."""

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        beta1, beta2 = bucket.options["betas"]
        # d² <= v (1-β1)² / ((1-β2) (1-β1²/β2)), by Cauchy and Schwarz; 52 v by default. That much may be added to v.
        small = beta1**2 < beta2 and (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)) < 2**26
        fits = bucket.group["bias_correction"] and small
        return super().take(bucket, known) if fits else (bucket.empty, bucket)

    def take_in(self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor) -> Tensor:
        sizes = [t.numel() for t in tensors["grad"]]
        direction = workspace(1, sum(sizes)).zero_()
        directions = [u.view_as(g) for u, g in zip(direction.split(sizes), tensors["grad"])]
        rho = debias(self.bucket.options["betas"][0], self.step)
        self._adam(directions, tensors["grad"], tensors, -rho, self.step, self.bucket.options["betas"][1], found_inf)
        return torch.dot(self.join(batch, tensors, "exp_avg", 0), direction)

    def move(self, tensors: dict[str, list[Tensor]], factor: Tensor, found_inf: Tensor) -> None:
        # The number of steps after which 1 - ALMOST_1^k is the correction of v; that of d is 1 after so many.
        steps = self.step * (-math.log(beta2) * 2**53 if (beta2 := self.bucket.options["betas"][1]) else math.inf)
        self._adam(tensors["param"], tensors["exp_avg"], tensors, factor, steps, ALMOST_1, found_inf)

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        averages: dict[str, list[Tensor]],
        lr: Tensor,
        step: Tensor,
        beta2: float,
        found_inf: Tensor,
    ) -> None:
        """Torch's fused kernel of Adam without decay, in place."""
        torch._fused_adam_(
            params,
            grads,
            averages["exp_avg"],
            averages["exp_avg_sq"],
            [],
            [step] * len(params),
            lr=lr,
            beta1=self.bucket.options["betas"][0],
            beta2=beta2,
            weight_decay=0.0,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )


def workspace(row: int, size: int) -> Tensor:
    """Room for a batch in one of two rows, in float32. It is kept: the system takes longer to give so much memory and to
    take it back than the computing takes.
    """
    rows = getattr(_kept, "rows", None)
    if rows is None or rows.shape[1] < size:
        rows = _kept.rows = torch.empty(2, max(size, 2 * chunks.CPU_PIECE))
    return rows[row, :size]


def sgd(params: list[Tensor], grads: list[Tensor], lr: Tensor, found_inf: Tensor, weight_decay: float = 0.0) -> None:
    """x <- x - lr (g + weight_decay x), by torch's fused kernel of SGD, in place."""
    torch._fused_sgd_(
        params,
        grads,
        [],
        weight_decay=weight_decay,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )
