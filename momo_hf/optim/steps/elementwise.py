"""Operations on flat tensors that the passes of all kinds share, in eager mode and under a compiler."""

import torch
from torch import Tensor

from momo_hf.optim.method import Method
from momo_hf.optim.steps.kind import Now, Tensors


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return torch.dot(x.flatten(), y.flatten())
    # The compiler fuses the sum into the loop that makes x and y, but would call a library for dot. Two dimensions are long
    # rows, see `kernels.compiled`.
    product = x * y
    return product.sum(1).sum() if product.dim() == 2 else product.sum()


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


def corrected(momentum: Tensor, correction: Tensor | None) -> Tensor:
    """d̂ = d/ρ."""
    return momentum if correction is None else momentum * correction


def bounded(direction: Tensor, bound: float | None) -> Tensor:
    """u with entries of at most `bound`, where there is one."""
    return direction if bound is None else direction.clamp(-bound, bound)


def buffers_of(method: Method, tensors: Tensors) -> dict[str, Tensor]:
    """The method's buffers among the tensors of a piece."""
    return {name: tensors[name] for name in method.buffers}


def averages_after(method: Method, tensors: Tensors, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
    """d and the buffers after they have taken in the gradient; nothing is written."""
    buffers = method.update(tensors["grad"], buffers_of(method, tensors), now.options)
    return lerp(tensors["exp_avg"], tensors["grad"], now.weight), buffers


def take_in(method: Method, tensors: Tensors, now: Now, ok: Tensor, momentum: bool = True) -> None:
    """Write the buffers, and d unless there is no momentum, in place; everything stays where `ok` is False."""
    grad, kept = zero_unless(ok, tensors["grad"]), ok.to(now.weight.dtype)
    for name, new in method.update(grad, buffers_of(method, tensors), now.options).items():
        lerp(tensors[name], new, kept, out=tensors[name])
    if momentum:
        lerp(tensors["exp_avg"], grad, now.weight * kept, out=tensors["exp_avg"])
