"""The passes by torch's fused kernels of SGD and Adam, on a CPU.

Both kernels leave everything as it is where `found_inf` is 1, so that a skip costs nothing.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from momo_hf.optim import chunks
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, batches, pieces
from momo_hf.optim.kernels.plain import Plain, standing
from momo_hf.optim.model import debias


# The largest β2 below 1. Adam's kernel with this β2, and with d for a gradient, does not change d and v by a bit: the
# average of d and d is d, and what d² adds to v rounds away.
ALMOST_1 = 1 - 2**-53


# From this size on an inner product of its own costs a tensor less than a place in a pack.
ALONE = 1 << 12
# The rows of the workspace: what does not stand in memory as one flat tensor, and u.
ROWS = {"exp_avg": 0, "param": 1, "direction": 1}
# One for every thread.
_kept = threading.local()


class Fused(Plain):
    """What the two sets share: lists of tensors that stay in the cache between the calls of a pass."""

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        fits = known and bucket.moves and bucket.device.type == "cpu"
        return (bucket, bucket.empty) if fits and bucket.dtype == torch.float32 else (bucket.empty, bucket)

    @cached_property
    def pieces(self) -> list[Piece]:
        return list(pieces(self.bucket.roles, self.bucket.dtype, self.bucket.group["foreach"] is not False, ALONE))

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

    def flat(self, batch: list[Piece], tensors: dict[str, list[Tensor]], role: str, index: int) -> Tensor:
        """The role of one piece of a batch as a flat tensor, from `lists`; what has to be joined is copied to the
        workspace, where it stays until the next one of the same role.
        """
        if not self.as_they_are:
            return tensors[role][index]
        piece = batch[index]
        room = workspace(ROWS[role], piece.numel) if len(piece.roles[role]) > 1 else None
        return piece.read(role, out=room)

    def pairs(self, batch: list[Piece], tensors: dict[str, list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """d and x of every piece as flat tensors."""
        for i in range(len(batch)):
            yield self.flat(batch, tensors, "exp_avg", i), self.flat(batch, tensors, "param", i)

    def take_in(
        self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Write momentum and buffers of a batch; d and u of every piece as flat tensors."""
        raise NotImplementedError

    def move(self, tensors: dict[str, list[Tensor]], factor: Tensor, found_inf: Tensor) -> None:
        """x <- x - factor u for a batch."""
        raise NotImplementedError

    def products(self) -> Tensor:
        norms, overlaps, zero = [], [], torch.zeros_like(self.weight)
        found_inf = self.usable.logical_not().to(torch.float32)
        averages = ("exp_avg", *self.method.buffers)
        roles = ("grad", *averages, *(("param",) if self.bucket.decays else ()))
        for batch in self.batches:
            tensors = self.lists(batch, roles)
            norms += [torch.dot(d, u) for d, u in self.take_in(batch, tensors, found_inf)]
            if self.bucket.decays:
                overlaps += [torch.dot(d, x) for d, x in self.pairs(batch, tensors)]
            self.put_back(batch, tensors, averages)
        sums = [torch.stack(column).sum() if column else zero for column in (norms, overlaps)]
        return torch.stack([*sums, zero])

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
            for momentum, param in self.pairs(batch, tensors):
                sums += standing(momentum, param, bucket.stored, zero)
            self.put_back(batch, tensors, ("param",))
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        return torch.stack(sums).view(-1, 2).sum(0) if sums else self.weight.new_zeros(2)


class FusedMomentum(Fused):
    """MoMo by SGD's kernel, which with a decay of -1 and a lr of -(1-β) is an average: d + (1-β) (g - d)."""

    def take_in(
        self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        sgd(tensors["exp_avg"], tensors["grad"], -self.weight, found_inf, weight_decay=-1.0)
        for i in range(len(batch)):
            momentum = self.flat(batch, tensors, "exp_avg", i)
            yield momentum, momentum

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

    @cached_property
    def rho(self) -> Tensor:
        return debias(self.bucket.options["betas"][0], self.step)

    def take_in(
        self, batch: list[Piece], tensors: dict[str, list[Tensor]], found_inf: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        parts = [piece.numel for piece in batch]
        direction = workspace(ROWS["direction"], sum(parts)).zero_()
        sizes = parts if len(parts) == len(tensors["grad"]) else [t.numel() for t in tensors["grad"]]
        directions = [u.view_as(g) for u, g in zip(direction.split(sizes), tensors["grad"])]
        self._adam(
            directions, tensors["grad"], tensors, -self.rho, self.step, self.bucket.options["betas"][1], found_inf
        )
        for i, part in enumerate(direction.split(parts)):
            yield self.flat(batch, tensors, "exp_avg", i), part

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
    """Room for a batch in one of the rows, in float32. It is kept: the system takes longer to give so much memory and to
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
