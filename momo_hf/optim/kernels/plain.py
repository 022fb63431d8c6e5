"""The two passes for any kind of step and any method on any device: what every other kernel set is tested against."""

from functools import cached_property

import torch
from torch import Tensor

from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.steps.kind import Tensors
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import Piece


class Plain(Kernels):
    """One piece after the other, by the functions of the kind as they are."""

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        return bucket, bucket.empty

    @cached_property
    def pieces(self) -> list[Piece]:
        return self.bucket.pieces()

    @cached_property
    def directions(self) -> list[Tensor | None]:
        """What the first pass keeps of costly methods, a tensor per piece."""
        return [None] * len(self.pieces)

    def first(self) -> Tensor:
        access = self.kind.first_access(self.method, self.how)
        sums: list[Tensor] = []
        for i, piece in enumerate(self.pieces):
            tensors = piece.read_all(access.reads)
            sums += self.first_of(tensors)
            self.directions[i] = tensors.get("direction")
            piece.write_all(tensors, access.writes)
            del tensors  # before the next piece is read
        return total(sums, len(self.kind.SUMS), self.now.weight)

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        access = self.kind.second_access(self.method, self.how)
        left: list[Tensor] = []
        for i, piece in enumerate(self.pieces):
            tensors = piece.read_all(access.reads)
            direction = self.directions[i]
            if direction is not None:
                tensors["direction"] = direction
            left += self.second_of(tensors, numbers)
            piece.write_all(tensors, access.writes)
            del tensors  # before the next piece is read
        return total(left, len(self.kind.LEFT), self.now.weight)

    def first_of(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The first pass over a piece, see `Kind`."""
        return self.kind.first(self.method, tensors, self.now, self.how)

    def second_of(self, tensors: Tensors, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The second pass over a piece, likewise."""
        return self.kind.second(self.method, tensors, self.now, self.how, numbers)


def total(numbers: list[Tensor], width: int, like: Tensor) -> Tensor:
    """The sum of rows of `width` numbers that stand one after the other."""
    return torch.stack(numbers).view(-1, width).sum(0) if numbers else like.new_zeros(width)
