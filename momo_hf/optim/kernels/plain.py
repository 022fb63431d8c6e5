"""The two passes for any method on any device, in flat pieces: what every other kernel set is tested against."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.chunks import Piece, pieces
from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.method import Method


class Plain(Kernels):
    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        return bucket, bucket.empty

    @cached_property
    def pieces(self) -> list[Piece]:
        return list(pieces(self.bucket.roles, self.bucket.dtype, self.bucket.group["foreach"] is not False))

    @cached_property
    def options(self) -> dict[str, Any]:
        """The method's hyperparameters and what it derives from the number of the step."""
        return self.bucket.options | self.method.corrections(self.step, self.bucket.options)

    def products(self) -> Tensor:
        roles = [role for role in self.bucket.roles if role != "param" or self.bucket.decays]
        sums = []
        for piece in self.pieces:
            tensors = {role: piece.read(role) for role in roles}
            sums += first_pass(self.method, self.options, tensors, self.weight, self.usable)
            if self.usable is not None:
                self._put_back(piece, tensors, ("exp_avg", *self.method.buffers))
        return torch.stack(sums).view(-1, 3).sum(0) if sums else self.weight.new_zeros(3)

    def overlap(self) -> Tensor:
        sums = [inner_product(piece.read("exp_avg"), piece.read("param")) for piece in self.pieces]
        return torch.stack(sums).sum() if sums else self.weight.new_zeros(())

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, sums = self.bucket, []
        taken = self.usable is not None and bucket.moves
        written = () if taken else ("exp_avg", *self.method.buffers)
        read = [role for role in bucket.roles if role != "grad" or not taken]
        for piece in self.pieces:
            tensors = {role: piece.read(role) for role in read}
            sums += second_pass(
                self.method, self.options, tensors, self.weight, factor, decay, ok, bucket.stored, **self.how
            )
            self._put_back(piece, tensors, (*written, "param") if bucket.moves else written)
        return torch.stack(sums).view(-1, 2).sum(0) if sums else self.weight.new_zeros(2)

    @property
    def how(self) -> dict[str, bool]:
        """What `second_pass` does, from the options."""
        return {"moves": self.bucket.moves, "decays": self.bucket.decays, "divide": self.bucket.group["divide"]}

    @staticmethod
    def _put_back(piece: Piece, tensors: dict[str, Tensor], roles: tuple[str, ...]) -> None:
        for role in roles:
            piece.write(role, tensors[role])


def first_pass(
    method: type[Method],
    options: dict[str, Any],
    piece: dict[str, Tensor],
    weight: Tensor,
    usable: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """<d, u>, where the parameter is given <d, x>, and where nobody knows whether the gradients are finite |g|², of one
    flat piece. Where it is known, d and the buffers are written, in place.
    """
    zero = torch.zeros_like(weight)
    if usable is None:
        grad, size = piece["grad"], inner_product(piece["grad"], piece["grad"])
        momentum = lerp(piece["exp_avg"], grad, weight)
        buffers = method.update_buffers(grad, {name: piece[name] for name in method.buffers}, options)
    else:
        take_in(method, options, piece, weight, usable)
        size = zero
        momentum, buffers = piece["exp_avg"], {name: piece[name] for name in method.buffers}
    norm = inner_product(momentum, method.precondition(momentum, buffers, options))
    overlap = inner_product(momentum, piece["param"]) if "param" in piece else zero
    return norm, overlap, size


def take_in(
    method: type[Method], options: dict[str, Any], piece: dict[str, Tensor], weight: Tensor, ok: Tensor
) -> None:
    """Write d and the buffers of one flat piece in place, unless `ok` is False."""
    grad, kept = zero_unless(ok, piece["grad"]), ok.to(weight.dtype)
    buffers = {name: piece[name] for name in method.buffers}
    for name, new in method.update_buffers(grad, buffers, options).items():
        lerp(piece[name], new, kept, out=piece[name])
    lerp(piece["exp_avg"], grad, weight * kept, out=piece["exp_avg"])


def second_pass(
    method: type[Method],
    options: dict[str, Any],
    piece: dict[str, Tensor],
    weight: Tensor,
    factor: Tensor,
    decay: Tensor,
    ok: Tensor,
    stored: torch.dtype,
    moves: bool,
    decays: bool,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    """d and the buffers, where a gradient is given to take in, and, where it moves, the parameter of one flat piece, in
    place; <d, x> and <d, rounding>.
    """
    if "grad" in piece:
        take_in(method, options, piece, weight, ok)
    momentum, param = piece["exp_avg"], piece["param"]
    if moves:
        direction = method.precondition(momentum, {name: piece[name] for name in method.buffers}, options)
        if decays and not divide:
            param.mul_(1 - decay)
        param.addcmul_(zero_unless(ok, direction), factor, value=-1)
        if decays and divide:
            param.div_(1 + decay)
    return standing(momentum, param, stored, zero=torch.zeros_like(weight))


def standing(momentum: Tensor, param: Tensor, stored: torch.dtype, zero: Tensor) -> tuple[Tensor, Tensor]:
    """<d, x> for the parameter as it will be stored, and <d, what its rounding adds>."""
    if stored == param.dtype:
        return inner_product(momentum, param), zero
    rounded = param.to(stored).to(param.dtype)
    return inner_product(momentum, rounded), inner_product(momentum, rounded - param)


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    # The compiler fuses the sum into the loop that makes x and y, but would call a library for dot.
    return (x * y).sum() if torch.compiler.is_compiling() else torch.dot(x.flatten(), y.flatten())


def lerp(start: Tensor, end: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """(1 - weight) start + weight end."""
    if not torch.compiler.is_compiling():
        return torch.lerp(start, end, weight, out=out)
    # Torch's lerp has one formula for small weights and one for large; the compiler takes twice as long over both.
    value = start * (1 - weight) + end * weight
    return value if out is None else out.copy_(value)


def zero_unless(ok: Tensor, tensor: Tensor) -> Tensor:
    """A copy of the tensor, or zeros where `ok` is False; by its bits, because NaN * 0 is NaN and `where` is slow."""
    if torch.compiler.is_compiling():
        return torch.where(ok, tensor, 0.0)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[tensor.dtype]
    return (tensor.view(bits) * ok.to(bits)).view(tensor.dtype)
