"""The passes of iterate averaging over the parameters, in flat pieces, for any method on any device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.averaged_model import AveragedStep, Sums
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, pieces
from momo_hf.optim.kernels.plain import zero_unless
from momo_hf.optim.method import Method
from momo_hf.optim.sharding import Layout, local, sum_over_shards


@dataclass(frozen=True)
class Part:
    """A bucket with the roles "y", "z" and the method's buffers, and what its passes need.

    Attributes:
        bucket: its parameters.
        method: the method.
        options: its hyperparameters and what it derives from the number of the step.
        step: k for these parameters, 0-dim; those that joined a running model have had fewer steps.
        pieces: all its tensors.
    """

    bucket: Bucket
    method: type[Method]
    options: dict[str, Any]
    step: Tensor
    pieces: list[Piece]

    def read(self, piece: Piece, *roles: str) -> list[Tensor]:
        return [piece.read(role) for role in roles]

    def update_buffers(self, grad: Tensor, piece: Piece) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The buffers before and after a gradient, by name."""
        old = {name: piece.read(name) for name in self.method.buffers}
        return old, {**old, **self.method.update_buffers(grad, old, self.options)}

    def direction(self, grad: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """D^{-1} g."""
        return self.method.precondition(grad, buffers, self.options)


def parts_of(method: type[Method], buckets: list[Bucket], step: Tensor) -> list[Part]:
    """The parts of a step, for `sums_of` and `write`.

    Args:
        method: the method.
        buckets: the parameters.
        step: k, 0-dim.
    """
    parts = []
    for bucket in buckets:
        own = (step if bucket.start is None else step - bucket.start).to(bucket.device, bucket.dtype)
        options = bucket.options | method.corrections(own, bucket.options)
        cut = list(pieces(bucket.roles, bucket.dtype, bucket.group["foreach"] is not False))
        parts.append(Part(bucket, method, options, own, cut))
    return parts


def sums_of(parts: list[Part], layouts: Iterable[Layout | None], like: Tensor) -> Sums:
    """First pass, and the one sum over all shards.

    Args:
        parts: from `parts_of`.
        layouts: every layout of the model, in the same order on all processes.
        like: shape (groups,), with dtype and device of the result.
    """
    sums = {layout: like.new_zeros(len(Sums._fields), len(like)) for layout in layouts}
    for part in parts:
        found = [products_of_piece(part, piece) for piece in part.pieces] if part.bucket.moves else []
        if found:
            sums[part.bucket.layout][:, part.bucket.index] += torch.stack(found).sum(0).to(like)
    return Sums(*sum(sum_over_shards(total, layout) for layout, total in sums.items()).unbind())


def products_of_piece(part: Part, piece: Piece) -> Tensor:
    """What `Sums` holds, of one flat piece."""
    grad, y, z = part.read(piece, "grad", "y", "z")
    _, buffers = part.update_buffers(grad, piece)
    norm = torch.dot(grad, part.direction(grad, buffers))
    shrinks = part.bucket.decays and part.bucket.group["divide"]
    overlap = torch.dot(grad, z) if shrinks else torch.zeros_like(norm)
    written = sum((buffers[name].sum() for name in part.method.buffers), torch.zeros_like(norm))
    return torch.stack([norm, torch.dot(grad, z - y), overlap, written])


def write(parts: list[Part], update: AveragedStep, beta: float) -> None:
    """Second pass: the buffers, z, y and the parameters.

    Args:
        parts: from `parts_of`.
        update: the step.
        beta: β of y = (1-β) z + β x.
    """
    for part in parts:
        bucket = part.bucket
        share = update.share
        if bucket.start is not None:
            # The average of parameters that joined a running model is that of their own steps, weighted by their own k.
            # Steps never fall, so that this is less than w / Σ w for those that were there from the start.
            share = torch.where(update.ok, share.maximum(2 / (part.step.to(share) + 1)), share)
        values = (update.factor[bucket.index], update.decay[bucket.index], share)
        factor, decay, share = (value.to(bucket.device, bucket.dtype) for value in values)
        for piece in part.pieces:
            write_piece(part, piece, factor, decay, share, update.ok.to(bucket.device), beta)


def write_piece(
    part: Part, piece: Piece, factor: Tensor, decay: Tensor, share: Tensor, ok: Tensor, beta: float
) -> None:
    """The buffers and, where there is a gradient, z and y of one flat piece."""
    bucket = part.bucket
    grad = zero_unless(ok, piece.read("grad"))
    old, buffers = part.update_buffers(grad, piece)
    for name, tensor in old.items():
        buffers[name] = torch.lerp(tensor, buffers[name], ok.to(tensor.dtype), out=tensor)
        piece.write(name, tensor)
    if not bucket.moves:
        return
    y, z = part.read(piece, "y", "z")
    moved = zero_unless(ok, part.direction(grad, buffers)).mul_(-factor)  # z_{k+1} - z_k
    if bucket.decays and bucket.group["divide"]:
        moved.addcmul_(z, decay, value=-1).div_(1 + decay)
    elif bucket.decays:
        moved.addcmul_(y, decay, value=-1)
    # x <- x + c (z - x), written for y = (1-β) z + β x.
    y.lerp_(z, share).addcmul_(moved, 1 - beta * (1 - share))
    z.add_(moved)
    piece.write("z", z)
    piece.write("y", y)
    if bucket.stored != bucket.dtype:
        piece.write("param", y)


def put(entries: list[tuple[Tensor, dict[str, Tensor]]], beta: float, train: bool) -> None:
    """Write y, or else x, into parameters that hold the other.

    In float64: then y follows from the rounded x again where the last digits of both weigh the same, and elsewhere a y
    that leads back to the same x. So nothing drifts, however often the modes change.

    Args:
        entries: parameters with their states.
        beta: β.
        train: whether they are to hold y.
    """
    together: dict[tuple, dict[str, list[Tensor]]] = {}
    for p, entry in entries:
        held = entry.get("y", p)
        roles = together.setdefault((p.device, p.dtype, held is p), {"param": [], "held": [], "z": []})
        for role, tensor in zip(roles, (p, held, entry["z"])):
            roles[role].append(local(tensor))
    for (device, _, alone), roles in together.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        for piece in pieces(roles, wide):
            held, z = piece.read("held"), piece.read("z")
            if not train:
                held = (held - (1 - beta) * z) / beta
            elif alone:
                held = (1 - beta) * z + beta * held
            piece.write("param", held)
