"""What the sets on torch's fused kernels of SGD and Adam share, on a CPU: lists of tensors that stay in the cache between
the calls of a pass, and the kernels as the steps of MoMo use them.

On a CPU a look at a number costs nothing, so that a step that is to be dropped is seen here, and not in the kernels.
"""

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.tensors import chunks
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import Piece, batches, pieces


# The largest β2 below 1. Adam's kernel with this β2 does not change v by a bit: what g² adds to it rounds away.
ALMOST_1 = 1 - 2**-53
# From this size on an inner product of its own costs a tensor less than a place in a pack.
ALONE = 1 << 12
# The rows of the workspace: what does not stand in memory as one flat tensor, u, and a momentum that nobody needs.
FIRST, SECOND, DIRECTION, SCRATCH = range(4)
# One for every thread.
_kept = threading.local()

Lists = dict[str, list[Tensor]]


class Batch:
    """Pieces of one call of a kernel, which stay in the cache for what is computed with them next.

    Args:
        parts: the pieces.
        as_they_are: whether a kernel can work on the tensors themselves; otherwise it gets copies.
    """

    def __init__(self, parts: list[Piece], as_they_are: bool) -> None:
        self.parts, self.as_they_are = parts, as_they_are
        self._flats: dict[tuple[str, int], Tensor] = {}
        self.numels = [part.numel for part in parts]

    def lists(self, roles: Sequence[str]) -> Lists:
        """The tensors by role, or copies that a kernel can work on; `put_back` is for these."""
        if self.as_they_are:
            return {role: list(chain.from_iterable(part.roles[role] for part in self.parts)) for role in roles}
        return {role: [part.read(role) for part in self.parts] for role in roles}

    def put_back(self, tensors: Lists, roles: Sequence[str]) -> None:
        if not self.as_they_are:
            for role in roles:
                for part, tensor in zip(self.parts, tensors[role]):
                    part.write(role, tensor)

    def flat(self, tensors: Lists, role: str, index: int, row: int) -> Tensor:
        """A role of one piece as a flat tensor; what has to be joined is copied to a row of the workspace."""
        if not self.as_they_are:
            return tensors[role][index]
        part = self.parts[index]
        if len(part.roles[role]) > 1:
            return part.read(role, out=workspace(row, part.numel))
        flat = self._flats.get((role, index))
        if flat is None:
            flat = self._flats[role, index] = part.read(role)
        return flat

    def products(self, tensors: Lists, role: str, other: str) -> list[Tensor]:
        """<x, y> of every piece."""
        indices = range(len(self.parts))
        return [torch.dot(self.flat(tensors, role, i, FIRST), self.flat(tensors, other, i, SECOND)) for i in indices]

    def products_with(self, tensors: Lists, role: str, flat: Tensor) -> list[Tensor]:
        """<x, y> of every piece, with y one flat tensor over all of them."""
        parts = enumerate(flat.split(self.numels))
        return [torch.dot(self.flat(tensors, role, i, FIRST), part) for i, part in parts]

    def like(self, tensors: list[Tensor], flat: Tensor) -> list[Tensor]:
        """A flat tensor over all pieces as views in the shapes of some tensors."""
        return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


class Fused(Plain):
    """Base of the sets: which tensors they take, and how these are divided."""

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        fits = known and bucket.moves and bucket.device.type == "cpu"
        return (bucket, bucket.empty) if fits and bucket.dtype == torch.float32 else (bucket.empty, bucket)

    @cached_property
    def usable(self) -> bool:
        """Whether the step can be taken, as far as was known before it."""
        return bool(self.now.usable)

    @cached_property
    def rho(self) -> float:
        """ρ_k."""
        return 1.0 if self.now.rho is None else float(self.now.rho)

    @cached_property
    def batches(self) -> list[Batch]:
        roles = self.bucket.roles
        together = list(pieces(roles, self.bucket.dtype, self.bucket.group["foreach"] is not False, ALONE))
        everything = list(chain.from_iterable(roles.values()))
        as_they_are = {t.dtype for t in everything} == {self.bucket.dtype} and all(
            map(Tensor.is_contiguous, everything)
        )
        return [Batch(p, as_they_are) for p in batches(together, chunks.CPU_PIECE, lambda piece: piece.numel)]

    def sums(self, *columns: list[Tensor]) -> Tensor:
        """The sums over columns of numbers, of which some may be empty; NaN where the step cannot be taken."""
        if not self.usable:
            return self.now.weight.new_full((len(columns),), math.nan)
        zero = torch.zeros_like(self.now.weight)
        return torch.stack([torch.stack(column).sum() if column else zero for column in columns])

    # ---- What the method's kernel does ----

    def absorb(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        """Take the gradients into momentum and buffers; ρ <d, u> of every piece, with u = direction(d̂)."""
        raise NotImplementedError

    def absorb_gradient(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        """Take the gradients into the buffers; <g, u> of every piece, with u = direction(g)."""
        raise NotImplementedError

    def move(self, batch: Batch, tensors: Lists, target: str, vector: str, factor: float) -> None:
        """x <- x - factor direction(vector) for a role; averages and buffers stay."""
        raise NotImplementedError


class FusedMomentum(Fused):
    """By SGD's kernel, which with a decay of -1 and a lr of -(1-β) is an average: d + (1-β) (g - d)."""

    def absorb(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        sgd(tensors["exp_avg"], tensors["grad"], -float(self.now.weight), weight_decay=-1.0)
        return batch.products(tensors, "exp_avg", "exp_avg")

    def absorb_gradient(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        return batch.products(tensors, "grad", "grad")

    def move(self, batch: Batch, tensors: Lists, target: str, vector: str, factor: float) -> None:
        sgd(tensors[target], tensors[vector], factor)


class FusedAdam(Fused):
    """By Adam's kernel: from 0 with a lr of -1, where it ends at u; and with `ALMOST_1`, where it only moves."""

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        beta1, beta2 = bucket.options["betas"]
        # d² <= v (1-β1)² / ((1-β2) (1-β1²/β2)), by Cauchy and Schwarz; 52 v by default. And g² <= v / (1-β2). That much
        # may be added to v.
        small = beta1**2 < beta2 and (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)) < 2**26
        fits = bucket.group["bias_correction"] and small and 1 - beta2 > 2**-26
        return super().take(bucket, known) if fits else (bucket.empty, bucket)

    @cached_property
    def betas(self) -> tuple[float, float]:
        return self.bucket.options["betas"]

    def absorb(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        return self._taken_in(batch, tensors, "exp_avg", tensors["exp_avg"], -self.rho, self.betas)

    def absorb_gradient(self, batch: Batch, tensors: Lists) -> list[Tensor]:
        scratch = batch.like(tensors["grad"], workspace(SCRATCH, sum(batch.numels)))
        return self._taken_in(batch, tensors, "grad", scratch, -1.0, (0.0, self.betas[1]))

    def _taken_in(
        self, batch: Batch, tensors: Lists, role: str, momenta: list[Tensor], lr: float, betas: tuple[float, float]
    ) -> list[Tensor]:
        """Adam's own step from 0 along momenta that take in the gradients, and its products with a role."""
        direction = workspace(DIRECTION, sum(batch.numels)).zero_()
        self.adam(batch.like(tensors["grad"], direction), tensors["grad"], momenta, tensors, lr, betas, self.now.step)
        return batch.products_with(tensors, role, direction)

    def move(self, batch: Batch, tensors: Lists, target: str, vector: str, factor: float) -> None:
        self.apply(batch, tensors, tensors[target], vector, factor, self.now.step)

    def apply(
        self, batch: Batch, tensors: Lists, into: list[Tensor], vector: str, factor: float, step: Tensor
    ) -> None:
        """x <- x - factor D^{-1} vector, with the v that there is and its correction at a step."""
        vectors = tensors[vector]
        # The average of a vector and itself is the vector.
        momenta = vectors
        if vector == "grad":
            momenta = batch.like(vectors, workspace(SCRATCH, sum(batch.numels)))
        # The number of steps after which 1 - ALMOST_1^k is the correction of v.
        beta2 = self.betas[1]
        steps = step * (-math.log(beta2) * 2**53 if beta2 else math.inf)
        self.adam(into, vectors, momenta, tensors, factor, (0.0, ALMOST_1), steps)

    def adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        tensors: Lists,
        lr: float,
        betas: tuple[float, float],
        step: Tensor,
    ) -> None:
        """Torch's fused kernel of Adam without decay, in place."""
        torch._fused_adam_(
            params,
            grads,
            momenta,
            tensors["exp_avg_sq"],
            [],
            [step] * len(params),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
        )


def workspace(row: int, size: int) -> Tensor:
    """Room for a batch in one of the rows, in float32. It is kept: the system takes longer to give so much memory and to
    take it back than the computing takes.
    """
    rows = getattr(_kept, "rows", None)
    if rows is None or rows.shape[1] < size:
        rows = _kept.rows = torch.zeros(4, max(size, 2 * chunks.CPU_PIECE))
    return rows[row, :size]


def sgd(params: list[Tensor], grads: list[Tensor], lr: float, weight_decay: float = 0.0) -> None:
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
    )
