"""What the sets on torch's fused kernels of SGD and Adam share, on a CPU: lists of tensors that stay in the cache between the
calls of a pass, and the kernels as the steps of MoMo use them.

On a CPU a look at a number costs nothing, so that a step that is to be dropped is seen here, and not in the kernels.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate, chain, islice
from operator import add
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.kernels.lists import ByRole, clamp, divided, inner, memory, size_of, views, widened
from momo_hf.optim.steps.model import debias
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import in_one_order


# The largest β2 below 1. Adam's kernel with this β2 does not change v by a bit: what g² adds to it rounds away.
ALMOST_1 = 1 - 2**-53


class Fused(Kernels):
    """Base of the sets: which tensors they take, and how these are divided.

    Attributes:
        vector: the role whose direction the step goes along.
        bound: of the entries of u, or None.
    """

    corrects = reads = True
    vector = "exp_avg"
    bound: float | None = None

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        fits = finite_known and bucket.moves and bucket.device.type == "cpu"
        if not fits or bucket.dtype != torch.float32:
            return bucket.empty, bucket
        own = [i for i, role in enumerate(bucket.roles) if role != "grad"]  # a gradient may be copied
        return bucket.split(lambda row: in_one_order([row[i] for i in own]))

    @cached_property
    def pieces(self) -> list[ByRole]:
        """The lists of every piece, by roles."""
        made = self.bucket.made(divided)
        grads = made.division.of(self.bucket.roles["grad"], self.bucket.roles["param"])
        return [{**own, "grad": grad} for own, grad in zip(made.pieces, grads)]

    @cached_property
    def directions(self) -> list[list[Tensor] | None]:
        """What the first pass keeps of u, by pieces."""
        return [None] * len(self.pieces)

    def read(self, piece: ByRole, roles: Iterable[str]) -> ByRole:
        """Some roles of a piece, in the dtype to compute in."""
        if self.bucket.made(divided).wide:
            return piece.copy()
        return {role: widened(piece[role]) for role in roles}

    def write(self, piece: ByRole, roles: Iterable[str], tensors: ByRole) -> None:
        """Put back what was read, or what has taken its place."""
        for role in () if self.bucket.made(divided).wide else roles:
            if tensors[role] is not piece[role]:
                torch._foreach_copy_(piece[role], tensors[role])

    @cached_property
    def step(self) -> Any:
        """k, in Python's numbers."""
        return self.now.step

    @cached_property
    def rho(self) -> float:
        """What the vector has to be divided by: ρ_k."""
        return self.rho_at(self.step)

    def rho_at(self, step: Any) -> float:
        """1 - β^k of the momentum, or 1 where it is not corrected."""
        return float(debias(self.bucket.beta, step)) if self.bucket.group["bias_correction"] else 1.0

    def first(self) -> Tensor:
        if not self.now.inputs_valid:
            return self.row([math.nan] * len(self.kind.SUMS))
        access = self.kind.first_access(self.method, self.how)
        found = [0.0] * len(self.kind.SUMS)
        for i, piece in enumerate(self.pieces):
            tensors = self.read(piece, access.reads)
            found = [*map(add, found, self.first_of(tensors))]
            self.directions[i] = tensors.get("direction")
            self.write(piece, access.writes, tensors)
        if not all(map(math.isfinite, found)):
            memory.clear()
        return self.row(found)

    def second(self, numbers: tuple[Any, ...]) -> Tensor:
        access = self.kind.second_access(self.method, self.how)
        left = [0.0] * len(self.kind.LEFT)
        for piece, direction in zip(self.pieces, self.directions):
            tensors = self.read(piece, access.reads)
            if direction is not None:
                tensors["direction"] = direction
            left = [*map(add, left, self.second_of(tensors, numbers))]
            self.write(piece, access.writes, tensors)
        torch.autograd.graph.increment_version(self.bucket.roles["param"])  # a fused kernel does not
        return self.row(left)

    def row(self, numbers: list[float]) -> Tensor:
        """What a pass returns."""
        return torch.tensor(numbers, dtype=self.bucket.dtype, device="cpu")

    def first_of(self, tensors: ByRole) -> tuple[float, ...]:
        """The first pass over a piece, see `Kind`."""
        raise NotImplementedError

    def second_of(self, tensors: ByRole, numbers: tuple[Any, ...]) -> tuple[float, ...]:
        """The second pass over a piece, likewise."""
        raise NotImplementedError

    # ---- What the method's kernel does ----

    def absorb(self, tensors: ByRole) -> float:
        """Take the gradient into momentum and buffers; <vector, u>, with u = direction(vector / ρ)."""
        raise NotImplementedError

    def kept(self, tensors: ByRole) -> list[Tensor] | None:
        """ρ u, or rather u where the kernel corrects the vector, in the second pass; None where it is to be made again."""
        raise NotImplementedError

    def move(self, tensors: ByRole, target: str, factor: float) -> None:
        """x <- x - factor u for a role; averages and buffers stay."""
        raise NotImplementedError


class FusedMomentum(Fused):
    """By SGD's kernel, which with a decay of -1 and a lr of -(1-β) is an average: d + (1-β) (g - d)."""

    def absorb(self, tensors: ByRole) -> float:
        vector = tensors[self.vector]
        if self.vector == "exp_avg":
            sgd(vector, tensors["grad"], [], lr=-float(self.now.weight), weight_decay=-1.0)
        return inner(vector, vector) / self.rho

    def kept(self, tensors: ByRole) -> list[Tensor]:
        return tensors[self.vector]

    def move(self, tensors: ByRole, target: str, factor: float) -> None:
        sgd(tensors[target], tensors[self.vector], [], lr=factor / self.rho)


class FusedAdam(Fused):
    """By Adam's kernel: with a lr and a decay of -1, where it ends at u wherever it began; and with `ALMOST_1`, where it
    only moves.
    """

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        beta1, beta2 = bucket.options["betas"]
        # d² <= v (1-β1)² / ((1-β2) (1-β1²/β2)), by Cauchy and Schwarz; 52 v by default. And g² <= v / (1-β2). That much
        # may be added to v.
        small = beta1**2 < beta2 and (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)) < 2**26
        fits = bucket.group["bias_correction"] and small and 1 - beta2 > 2**-26
        return super().take(bucket, finite_known) if fits else (bucket.empty, bucket)

    @cached_property
    def count(self) -> Tensor:
        """k, as the kernel takes it."""
        return self.steps(self.step)

    @staticmethod
    def steps(number: float) -> Tensor:
        """A number of steps, likewise."""
        return torch.tensor(number, dtype=torch.float32, device="cpu")

    @cached_property
    def places(self) -> Iterator[list[Tensor]]:
        """Where u of the pieces is kept, one after the other, of as many as there is room for."""
        sizes = self.bucket.made(divided).sizes
        room = memory.keep(self, sum(map(sum, sizes)))
        ends = accumulate(map(sum, sizes))
        sizes = [own for own, end in zip(sizes, ends) if end <= room.numel()]
        flat = iter(room[: sum(map(sum, sizes))].split([*chain.from_iterable(sizes)]))
        return iter([[*islice(flat, len(own))] for own in sizes])

    def absorb(self, tensors: ByRole) -> float:
        vector, (beta1, beta2) = tensors[self.vector], self.bucket.options["betas"]
        u = next(self.places, None)
        if u is None:
            u = views(memory.room("spare", size_of(vector)), vector)
        else:
            tensors["direction"] = u
        averaged = self.vector == "exp_avg"
        momentum = vector if averaged else views(memory.room("unread", size_of(vector)), vector)
        betas = (beta1 if averaged else 0.0, beta2)
        self.adam(u, tensors["grad"], momentum, tensors, -1.0, betas, self.count, decay=-1.0)
        if self.bound is not None:
            clamp(u, self.bound)
        return inner(vector, u)

    def kept(self, tensors: ByRole) -> list[Tensor] | None:
        return tensors.get("direction")

    def move(self, tensors: ByRole, target: str, factor: float) -> None:
        u, bound = self.kept(tensors), self.bound
        if u is None and bound is not None:
            u = views(memory.room("spare", size_of(tensors[target])), tensors[target])
            self.apply(tensors, u, self.vector, -1.0, self.step, decay=-1.0)
            torch._foreach_div_(u, self.rho)
            clamp(u, bound)
        if u is None:
            self.apply(tensors, tensors[target], self.vector, factor / self.rho, self.step)
        else:
            sgd(tensors[target], u, [], lr=factor)

    def apply(
        self, tensors: ByRole, target: list[Tensor], vector: str, factor: float, step: float, decay: float = 0.0
    ) -> None:
        """x <- (1 - factor decay) x - factor D^{-1} vector, with the v that there is and its correction at a step."""
        momentum = tensors[vector]  # the average of a vector and itself is the vector
        if vector == "grad":
            momentum = views(memory.room("unread", size_of(momentum)), momentum)
        # The number of steps after which 1 - ALMOST_1^k is the correction of v.
        beta2 = self.bucket.options["betas"][1]
        steps = self.steps(step * (-math.log(beta2) * 2**53 if beta2 else math.inf))
        self.adam(target, tensors[vector], momentum, tensors, factor, (0.0, ALMOST_1), steps, decay)

    def adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        tensors: ByRole,
        lr: float,
        betas: tuple[float, float],
        step: Tensor,
        decay: float,
    ) -> None:
        """Torch's fused kernel of AdamW, in place."""
        torch._fused_adamw_(
            params,
            grads,
            momenta,
            tensors["exp_avg_sq"],
            [],
            [step] * len(params),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=self.bucket.options["eps"],
            amsgrad=False,
            maximize=False,
        )


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> None:
    """Torch's fused kernel of SGD, in place."""
    torch._fused_sgd_(
        params,
        grads,
        averages,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
