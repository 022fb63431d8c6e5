"""What the sets on torch's fused kernels of SGD and Adam share, on a CPU: pieces that stay in the cache between the calls
of a pass, and the kernels as the steps of MoMo use them.

On a CPU a look at a number costs nothing, so that a step that is to be dropped is seen here, and not in the kernels.
"""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.kernels.memory import Memory
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.steps.kind import Tensors
from momo_hf.optim.tensors import chunks
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import Piece, pieces


# The largest β2 below 1. Adam's kernel with this β2 does not change v by a bit: what g² adds to it rounds away.
ALMOST_1 = 1 - 2**-53
# From this size on the calls for a tensor of its own cost less than its copies into packs and back.
ALONE = 1 << 12
# What stands in it is finite, because Adam's kernel clears it by a product with 0.
memory = Memory()


class Fused(Plain):
    """Base of the sets: which tensors they take, and how these are divided.

    Attributes:
        vector: the role whose direction the step goes along.
        bound: of the entries of u, or None.
    """

    corrects = True
    vector = "exp_avg"
    bound: float | None = None

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        fits = finite_known and bucket.moves and bucket.device.type == "cpu"
        return (bucket, bucket.empty) if fits and bucket.dtype == torch.float32 else (bucket.empty, bucket)

    @cached_property
    def pieces(self) -> list[Piece]:
        bucket, size = self.bucket, 2 * chunks.CPU_PIECE
        return list(pieces(bucket.roles, bucket.dtype, bucket.group["foreach"] is not False, min(ALONE, size), size))

    @cached_property
    def rho(self) -> float:
        """What the vector has to be divided by: ρ_k."""
        return self.rho_at(float(self.now.step))

    def rho_at(self, step: float) -> float:
        """1 - β^k of the momentum, or 1 where it is not corrected."""
        beta = self.bucket.beta
        if not self.bucket.group["bias_correction"]:
            return 1.0
        return -math.expm1(step * math.log(beta)) if beta and step else float(step > 0)

    @cached_property
    def zero(self) -> Tensor:
        return torch.zeros_like(self.now.weight)

    def first(self) -> Tensor:
        if not self.now.inputs_valid:
            return self.now.weight.new_full((len(self.kind.SUMS),), math.nan)
        sums = super().first()
        if not sums.isfinite().all():
            memory.clear()
        return sums

    def second(self, numbers: tuple[Any, ...]) -> Tensor:
        left = super().second(tuple(number.item() for number in numbers))
        torch.autograd.graph.increment_version(self.bucket.roles["param"])  # a fused kernel does not
        return left

    # ---- What the method's kernel does ----

    def absorb(self, tensors: Tensors) -> Tensor:
        """Take the gradient into momentum and buffers; <vector, u>, with u = direction(vector / ρ)."""
        raise NotImplementedError

    def kept(self, tensors: Tensors) -> Tensor | None:
        """ρ u, or rather u where the kernel corrects the vector, in the second pass; None where it is to be made again."""
        raise NotImplementedError

    def move(self, tensors: Tensors, target: str, factor: float) -> None:
        """x <- x - factor u for a role; averages and buffers stay."""
        raise NotImplementedError


class FusedMomentum(Fused):
    """By SGD's kernel, which with a decay of -1 and a lr of -(1-β) is an average: d + (1-β) (g - d)."""

    def absorb(self, tensors: Tensors) -> Tensor:
        vector = tensors[self.vector]
        if self.vector == "exp_avg":
            sgd(vector, tensors["grad"], [], lr=-float(self.now.weight), weight_decay=-1.0)
        return torch.dot(vector, vector) / self.rho

    def kept(self, tensors: Tensors) -> Tensor:
        return tensors[self.vector]

    def move(self, tensors: Tensors, target: str, factor: float) -> None:
        tensors[target].add_(tensors[self.vector], alpha=-factor / self.rho)


class FusedAdam(Fused):
    """By Adam's kernel: with a lr and a decay of -1, where it ends at u wherever it began; and with `ALMOST_1`, where it
    only moves.
    """

    _filled = 0

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        beta1, beta2 = bucket.options["betas"]
        # d² <= v (1-β1)² / ((1-β2) (1-β1²/β2)), by Cauchy and Schwarz; 52 v by default. And g² <= v / (1-β2). That much
        # may be added to v.
        small = beta1**2 < beta2 and (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)) < 2**26
        fits = bucket.group["bias_correction"] and small and 1 - beta2 > 2**-26
        return super().take(bucket, finite_known) if fits else (bucket.empty, bucket)

    @cached_property
    def room(self) -> Tensor:
        """Where u is kept, of as many pieces as there is room for."""
        return memory.keep(self, sum(piece.numel for piece in self.pieces))

    def absorb(self, tensors: Tensors) -> Tensor:
        vector, (beta1, beta2) = tensors[self.vector], self.bucket.options["betas"]
        end = self._filled + vector.numel()
        if end <= self.room.numel():
            u = tensors["direction"] = self.room[self._filled : end]
            self._filled = end
        else:
            u = memory.spare(vector.numel())
        averaged = self.vector == "exp_avg"
        momentum = vector if averaged else memory.scratch(vector.numel())
        betas = (beta1 if averaged else 0.0, beta2)
        self.adam(u, tensors["grad"], momentum, tensors, -1.0, betas, self.now.step, decay=-1.0)
        if self.bound is not None:
            u.clamp_(-self.bound, self.bound)
        return torch.dot(vector, u)

    def kept(self, tensors: Tensors) -> Tensor | None:
        return tensors.get("direction")

    def move(self, tensors: Tensors, target: str, factor: float) -> None:
        u, bound = self.kept(tensors), self.bound
        if u is None and bound is not None:
            u = memory.spare(tensors[target].numel())
            self.apply(tensors, u, self.vector, -1.0, self.now.step, decay=-1.0)
            u.div_(self.rho).clamp_(-bound, bound)
        if u is None:
            self.apply(tensors, tensors[target], self.vector, factor / self.rho, self.now.step)
        else:
            tensors[target].add_(u, alpha=-factor)

    def apply(
        self, tensors: Tensors, target: Tensor, vector: str, factor: float, step: Tensor, decay: float = 0.0
    ) -> None:
        """x <- (1 - factor decay) x - factor D^{-1} vector, with the v that there is and its correction at a step."""
        momentum = tensors[vector]  # the average of a vector and itself is the vector
        if vector == "grad":
            momentum = memory.scratch(momentum.numel())
        # The number of steps after which 1 - ALMOST_1^k is the correction of v.
        beta2 = self.bucket.options["betas"][1]
        steps = step * (-math.log(beta2) * 2**53 if beta2 else math.inf)
        self.adam(target, tensors[vector], momentum, tensors, factor, (0.0, ALMOST_1), steps, decay)

    def adam(
        self,
        param: Tensor,
        grad: Tensor,
        momentum: Tensor,
        tensors: Tensors,
        lr: float,
        betas: tuple[float, float],
        step: Tensor,
        decay: float,
    ) -> None:
        """Torch's fused kernel of AdamW, in place."""
        torch._fused_adamw_(
            [param],
            [grad],
            [momentum],
            [tensors["exp_avg_sq"]],
            [],
            [step],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
        )


def sgd(
    param: Tensor,
    grad: Tensor,
    averages: list[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> None:
    """Torch's fused kernel of SGD, in place."""
    torch._fused_sgd_(
        [param],
        [grad],
        averages,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
