"""The two passes of a step over the parameters.

A step is a transaction: the first pass computes the inner products from what momentum and buffers are going to be, and
writes nothing; the second pass writes, with a step size that is known to be finite, or leaves everything as it was.
That costs one more read of the gradient than writing the momentum at once, and needs no collective of its own to find
out that another process met a NaN. `ok` is a tensor, so no value is read back: where it is False the gradient is
masked to 0 and every weight is 0.
"""

import functools
from collections.abc import Callable, Iterable
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
            found = products_of_bucket(method, bucket, weight.to(bucket.device), step)
            sums[bucket.layout][:, bucket.index] += found.to(weight.device)
    return sum(sum_over_shards(part, layout) for layout, part in sums.items())


def products_of_bucket(method: "MomoOptimizer", bucket: Bucket, weight: Tensor, step: Tensor) -> Tensor:
    """The three sums of a bucket."""
    roles = [role for role in bucket.roles if role != "param" or bucket.decays]
    options, sampled = options_at(method, bucket, step), bucket.group["slope"] == "gradient"
    fused = method.has_fused_kernel(bucket.device)
    copied = ("exp_avg", *method.buffers) if fused else ()
    pieces = ({role: piece.read(role, copy=role in copied) for role in roles} for piece in bucket.pieces)
    found = products_of_pieces(type(method), options, pieces, weight, sampled, fused)
    for batch in bucket.batches:
        tensors = [{role: tensor[role] for role in roles} for tensor in batch]
        products = compiled(products_of_pieces, type(method), len(batch))
        found = found + products(type(method), options, tensors, weight, sampled, fused=False)
    return found


def products_of_pieces(
    method: type["MomoOptimizer"],
    options: dict[str, Any],
    pieces: Iterable[dict[str, Tensor]],
    weight: Tensor,
    sampled: bool,
    fused: bool,
) -> Tensor:
    """<d, u>, where the parameter is given <d, x>, and where `sampled` <g, D^{-1} g> over flat pieces, from what d, u
    and D are going to be; with `fused`, momentum and buffers are copies, and torch's kernel works in place.
    """
    zero = torch.zeros_like(weight)
    rows = [zero.expand(3)]
    for piece in pieces:
        # Only the compiler meets other dtypes: it takes tensors whole and converts them in its loop, without a copy.
        piece = {role: tensor.to(weight.dtype) for role, tensor in piece.items()}
        grad, momentum = piece["grad"], piece["exp_avg"]
        buffers = {name: piece[name] for name in method.buffers}
        if fused:
            direction = method.fused_direction(grad, momentum, buffers, options)
        else:
            momentum = lerp(momentum, grad, weight)
            buffers = method.update_buffers(grad, buffers, options)
            direction = method.precondition(momentum, buffers, options)
        norm = inner_product(momentum, direction)
        overlap = inner_product(momentum, piece["param"]) if "param" in piece else zero
        sample = inner_product(grad, method.precondition(grad, buffers, options)) if sampled else zero
        # Together, piece by piece: the compiler makes one loop only of what stands close to each other.
        rows.append(torch.stack([norm, overlap, sample]))
    return torch.stack(rows).sum(0)


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    # The compiler fuses the sum into the loop that makes x and y, but would call a library for dot.
    return (x * y).sum() if torch.compiler.is_compiling() else torch.dot(x, y)


def lerp(start: Tensor, end: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """(1 - weight) start + weight end."""
    if not torch.compiler.is_compiling():
        return torch.lerp(start, end, weight, out=out)
    # Torch's lerp has one formula for small weights and one for large; the compiler takes twice as long over both.
    value = start * (1 - weight) + end * weight
    return value if out is None else out.copy_(value)


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
    if bucket.moves and bucket.uniform and method.has_fused_kernel(device):
        method.fused_write(bucket, step, factor, decay, ok)
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        return
    kind, options = type(method), options_at(method, bucket, step)
    how = {"decays": bucket.decays, "divide": bucket.group["divide"]}
    for piece in bucket.pieces:
        roles = {role: piece.read(role) for role in piece.roles if role != "param" or bucket.moves}
        write_piece(kind, options, roles, weight, factor, decay, ok, **how)
        for role, tensor in roles.items():
            if role != "grad":
                piece.write(role, tensor)
    for batch in bucket.batches:
        compiled(write_tensors, kind, len(batch))(kind, options, batch, weight, factor, decay, ok, **how)
    if bucket.batches:
        torch.autograd.graph.increment_version(bucket.roles["param"])


def write_piece(
    method: type["MomoOptimizer"],
    options: dict[str, Any],
    piece: dict[str, Tensor],
    weight: Tensor,
    factor: Tensor,
    decay: Tensor,
    ok: Tensor,
    decays: bool,
    divide: bool,
) -> None:
    """d, the buffers and, where it is given, the parameter of one flat piece, in place.

    x <- (x - τ r u) / (1 + a), or AdamW's x <- (1 - a) x - τ r u where not `divide`.
    """
    grad, kept = zero_unless(ok, piece["grad"]), ok.to(weight.dtype)
    buffers = {name: piece[name] for name in method.buffers}
    for name, new in method.update_buffers(grad, buffers, options).items():
        buffers[name] = lerp(piece[name], new, kept, out=piece[name])
    momentum = lerp(piece["exp_avg"], grad, weight * kept, out=piece["exp_avg"])
    if "param" in piece:
        param, move = piece["param"], method.precondition(momentum, buffers, options) * factor
        if decays and not divide:
            param.mul_(1 - decay)
        param.sub_(move)
        if decays and divide:
            param.div_(1 + decay)


def write_tensors(
    method: type["MomoOptimizer"], options: dict[str, Any], tensors: list[dict[str, Tensor]], *step: Any, **how: bool
) -> None:
    """The second pass for the compiler."""
    weight = step[0]
    for roles in tensors:
        piece = {role: tensor.to(weight.dtype) for role, tensor in roles.items()}
        write_piece(method, options, piece, *step, **how)
        for role, tensor in roles.items():
            if role != "grad" and tensor.dtype != weight.dtype:
                tensor.copy_(piece[role])


def zero_unless(ok: Tensor, tensor: Tensor) -> Tensor:
    """A copy of the tensor, or zeros where `ok` is False; by its bits, because NaN * 0 is NaN and `where` is slow."""
    if torch.compiler.is_compiling():
        return torch.where(ok, tensor, 0.0)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[tensor.dtype]
    return (tensor.view(bits) * ok.to(bits)).view(tensor.dtype)


def options_at(method: "MomoOptimizer", bucket: Bucket, step: Tensor) -> dict[str, Any]:
    """The method's hyperparameters and what it derives from the number of the step."""
    return bucket.options | method.corrections(step.to(bucket.device), bucket.options)


@functools.cache
def compiled(function: Callable[..., Any], method: type["MomoOptimizer"], count: int) -> Callable[..., Any]:
    """A pass over `count` tensors of one size, whichever it is; compiled once for each method and its options."""
    # With sizes, the compiler would also take floats for variable, and torch 2.13 may then find a graph in its cache on
    # disk that has the betas of another run in it.
    constant_floats = torch._dynamo.config.patch(specialize_float=True)
    return constant_floats(torch.compile(function, dynamic=True, isolate_recompiles=True))
