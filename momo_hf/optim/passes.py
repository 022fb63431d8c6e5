"""The two passes of a step over the parameters.

A step is a transaction: the first pass computes the inner products from what momentum and buffers are going to be, and
writes nothing; the second pass writes, with a step size that is known to be finite, or leaves everything as it was.
That costs one more read of the gradient than writing the momentum at once, and needs no collective of its own to find
out that another process met a NaN. `ok` is a tensor, so no value is read back: where it is False the gradient is
masked to 0 and every weight is 0.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from momo_hf.optim.chunks import Bucket
from momo_hf.optim.model import Step
from momo_hf.optim.sharding import Layout, sum_over_shards


if TYPE_CHECKING:
    from momo_hf.optim.base import MomoOptimizer


def inner_products(
    method: "MomoOptimizer", buckets: list[Bucket], layouts: list[Layout | None], weight: Tensor, step: Tensor
) -> Tensor:
    """First pass: n_g = <d_g, u_g>, s_g = <d_g, x_g> and <g_g, D_g^{-1} g_g> over all shards.

    Args:
        method: the optimizer, for its preconditioner.
        buckets: the parameters.
        layouts: every way in which parameters are split, in the same order on all processes.
        weight: 1-β_k, 0-dim.
        step: k, 0-dim.

    Returns:
        Three rows with one entry per parameter group; the last one is 0 unless the slope of the samples is asked for.
    """
    groups = len(method.param_groups)
    sums = {layout: weight.new_zeros(3, groups) for layout in layouts}
    for bucket in buckets:
        if bucket.moves:
            first = first_pass(type(method), bucket.group["compile"])
            here, options = weight.to(bucket.device), options_at(method, bucket, step)
            but = None if bucket.decays else "param"
            sampled = bucket.group["slope"] == "gradient"
            parts = [first(type(method), options, piece.read_all(but), here, sampled) for piece in bucket.pieces]
            if parts:
                sums[bucket.layout][:, bucket.index] += torch.stack(parts).sum(0).to(weight.device)
    return sum(sum_over_shards(part, layout) for layout, part in sums.items())


def products_of_piece(
    method: type["MomoOptimizer"],
    options: dict[str, Any],
    piece: dict[str, Tensor],
    weight: Tensor,
    sampled: bool,
) -> Tensor:
    """<d, u>, where the parameter is given <d, x>, and where `sampled` <g, D^{-1} g> of one flat piece, from what d, u
    and D are going to be.
    """
    grad = piece["grad"]
    buffers = {name: piece[name] for name in method.buffers}
    fused = None if torch.compiler.is_compiling() else method.fused_direction(grad, piece["exp_avg"], buffers, options)
    if fused is None:
        momentum = torch.lerp(piece["exp_avg"], grad, weight)
        buffers = method.update_buffers(grad, buffers, options)
        direction = method.precondition(momentum, buffers, options)
    else:
        momentum, buffers, direction = fused
    norm = inner_product(momentum, direction)
    overlap = inner_product(momentum, piece["param"]) if "param" in piece else torch.zeros_like(norm)
    sample = inner_product(grad, method.precondition(grad, buffers, options)) if sampled else torch.zeros_like(norm)
    return torch.stack([norm, overlap, sample])


def options_at(method: "MomoOptimizer", bucket: Bucket, step: Tensor) -> dict[str, Any]:
    """The method's hyperparameters and what it derives from the number of the step."""
    return bucket.options | method.corrections(step.to(bucket.device), bucket.options)


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    # The compiler fuses the sum into the loop that makes x and y, but would call a library for dot.
    return (x * y).sum() if torch.compiler.is_compiling() else torch.dot(x, y)


@functools.cache
def first_pass(method: type["MomoOptimizer"], compiled: bool) -> Callable[..., Tensor]:
    """`products_of_piece`, or its compiled form: one kernel for pieces of any size."""
    return torch.compile(products_of_piece, dynamic=True, fullgraph=True) if compiled else products_of_piece


def write(method: "MomoOptimizer", bucket: Bucket, weight: Tensor, step: Tensor, update: Step) -> None:
    """Second pass: the momentum, the buffers and the parameters of a bucket.

    Args:
        method: the optimizer, for its preconditioner.
        bucket: the parameters.
        weight: 1-β_k, 0-dim.
        step: k, 0-dim.
        update: the step to take.
    """
    device = bucket.device
    weight, step, ok = weight.to(device), step.to(device), update.ok.to(device)
    factor, decay = update.factor[bucket.index].to(device), update.decay[bucket.index].to(device)
    if bucket.moves and bucket.uniform and method.fused_write(bucket, step, factor, decay, ok):
        return
    options, kept = options_at(method, bucket, step), ok.to(weight.dtype)
    for piece in bucket.pieces:
        grad = zero_unless(ok, piece.read("grad"))
        buffers = method.update_buffers(grad, {name: piece.read(name) for name in method.buffers}, options)
        for name, new in buffers.items():
            buffers[name] = piece.read(name).lerp_(new, kept)
            piece.write(name, buffers[name])
        momentum = piece.read("exp_avg").lerp_(grad, weight * kept)
        piece.write("exp_avg", momentum)
        if bucket.moves:
            param = piece.read("param")
            direction = method.precondition(momentum, buffers, options)
            shrink_then_move(param, direction * factor, decay, bucket.group)
            piece.write("param", param)


def shrink_then_move(param: Tensor, move: Tensor, decay: Tensor, group: dict) -> None:
    """x <- (x - move) / (1 + a), or AdamW's x <- (1 - a) x - move where `divide=False`, in place."""
    if group["weight_decay"] == 0:
        param.sub_(move)
    elif group["divide"]:
        param.sub_(move).div_(1 + decay)
    else:
        param.mul_(1 - decay).sub_(move)


def zero_unless(ok: Tensor, tensor: Tensor) -> Tensor:
    """A copy of the tensor, or zeros where `ok` is False: by its bits, because NaN * 0 is NaN."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[tensor.dtype]
    return (tensor.view(bits) * ok.to(bits)).view(tensor.dtype)
