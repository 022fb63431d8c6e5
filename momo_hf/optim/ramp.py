"""The steps of a search over all parameters: like those of training, on any device, in flat pieces, with less to go wrong.

A search takes sixty steps at most, so these are written for any method and any tensor and not for speed. During them a
parameter that has had a gradient moves at every step, with a gradient of 0 where it has none, so that the parameters have
done exactly what the last direction said. Parameters that join on the way count the steps of all.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, pieces
from momo_hf.optim.method import Method
from momo_hf.optim.model import average_weight, debias
from momo_hf.optim.search import Move
from momo_hf.optim.sharding import Layout, sum_over_shards


# The entry of a parameter's state that holds its value from before the search.
ORIGIN = "origin"


class Part:
    """One step of the ramp over the tensors of one bucket, which have a role `ORIGIN` too.

    Args:
        method: the class whose buffers, `update_buffers`, `precondition` and `corrections` count.
        bucket: the tensors, at least one.
        beta: β of the momentum.
        step: k, 0-dim.
    """

    def __init__(self, method: type[Method], bucket: Bucket, beta: float, step: Tensor) -> None:
        self.method, self.bucket = method, bucket
        corrected, now = bucket.group["bias_correction"], step.to(bucket.device, bucket.dtype)
        self.weight = average_weight(now, beta, corrected)
        self.rho, self.rho_before = (
            debias(beta, k) if corrected else torch.ones_like(k) for k in (now, now - 1)
        )  # ρ_k, ρ_{k-1}
        self.options, self.options_before = (
            bucket.options | method.corrections(k, bucket.options) for k in (now, now - 1)
        )

    @cached_property
    def pieces(self) -> list[Piece]:
        return list(pieces(self.bucket.roles, self.bucket.dtype))

    def products(self) -> Tensor:
        """`<g_k, u_{k-1}>`, `<d_k, u_k>` and `<g_k, D_k^{-1} g_k>`, shape (3,), of this process's part."""
        sums = torch.zeros_like(self.weight).expand(3).clone()
        for piece in self.pieces:
            grad = piece.read("grad")
            before = self.method.precondition(piece.read("exp_avg"), self._buffers(piece), self.options_before)
            slope = torch.dot(grad, before) / self.rho_before
            momentum, buffers = self._averages(piece, grad)
            norm = torch.dot(momentum, self.method.precondition(momentum, buffers, self.options)) / self.rho**2
            sample = torch.dot(grad, self.method.precondition(grad, buffers, self.options))
            sums += torch.stack([slope, norm, sample])
        return sums

    def write(self, move: Move) -> None:
        """Step, or leave everything as it was, or go back: parameters to their origin, averages and buffers to 0."""
        size, ok, back, begins = (value.to(self.bucket.device) for value in move)
        factor = size.to(self.bucket.dtype) / self.rho
        for piece in self.pieces:
            momentum, buffers = self._averages(piece, piece.read("grad"))
            param = piece.read("param")
            origin = torch.where(begins, param, piece.read(ORIGIN))
            stepped = param - factor * self.method.precondition(momentum, buffers, self.options)
            for role, new, start in (
                (ORIGIN, origin, origin),
                ("param", stepped, origin),
                *((name, new, torch.zeros_like(new)) for name, new in {"exp_avg": momentum, **buffers}.items()),
            ):
                piece.write(role, torch.where(back, start, torch.where(ok, new, piece.read(role))))

    def _averages(self, piece: Piece, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """d_k and the buffers after they have taken in g_k; nothing is written."""
        momentum = torch.lerp(piece.read("exp_avg"), grad, self.weight)
        return momentum, self.method.update_buffers(grad, self._buffers(piece), self.options)

    def _buffers(self, piece: Piece) -> dict[str, Tensor]:
        return {name: piece.read(name) for name in self.method.buffers}


def inner_products(parts: list[Part], layouts: dict[Layout | None, Any], like: Tensor) -> Tensor:
    """`Part.products` of the whole model, with one sum over the shards of every layout.

    Args:
        parts: this process's.
        layouts: every layout, in the same order on all processes.
        like: a scalar with dtype and device of the result.
    """
    sums = {layout: like.new_zeros(3) for layout in layouts}
    for part in parts:
        sums[part.bucket.layout] += part.products().to(like)
    return sum(sum_over_shards(found, layout) for layout, found in sums.items())
