"""Muon as a method: the direction of a matrix is its polar factor, in the size of a step of Adam."""

import math

import torch
from torch import Tensor

from momo_hf.optim.method import Buffers, Method, Options


# a, b, c of the Newton-Schulz step, as in torch.optim.Muon, and how many steps there are. They bring every singular value
# near 1, between 0.7 and 1.2, and do not converge to it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# A step of Adam has a root mean square of about 0.2 to 0.4 (Liu et al., 2025, arXiv 2502.16982).
RMS = 0.2
TINY = 1e-30


class Muon(Method):
    """u = s · polar(d̂), s = 0.2 √max(rows, columns), for parameters of two or more dimensions (Jordan 2024; with the model
    of MoMo: Crawshaw, Modi, Liu, Gower 2025, arXiv 2510.09827).

    polar(M) is U Vᵀ of the singular value decomposition M = U Σ Vᵀ. A parameter of more dimensions, as the kernel of a
    convolution, is the matrix (first, all others). `<d̂, u>` is s times the nuclear norm of d̂.
    """

    whole = costly = keeps_momentum = True
    ramp_start = 1e-6

    def direction(self, vector: Tensor, buffers: Buffers, options: Options) -> Tensor:
        matrices = vector.flatten(2)
        return polar(matrices, length(matrices)).view(vector.shape)

    def sample(self, grad: Tensor, momentum: Tensor, buffers: Buffers, options: Options) -> Tensor:
        """The sum of |g|²_F / |d̂|_F: the direction does not grow with the gradient, so what it is measured by has to stand
        still while the gradients grow.
        """
        squares = grad.flatten(1).square().sum(1)
        return (squares / momentum.flatten(1).norm(dim=1).clamp(min=TINY)).sum()


def polar(matrices: Tensor, factor: float = 1.0) -> Tensor:
    """The polar factors of a batch of matrices, by five Newton-Schulz steps; 0 where a matrix is 0.

    X_0 = M / |M|_F, by its largest entry first, so that no square is too small for its dtype.

    Args:
        matrices: shape (matrices, rows, columns).
        factor: what they are multiplied by.

    Returns:
        A new tensor of the same shape and dtype.
    """
    tiny = torch.finfo(matrices.dtype).tiny
    x = matrices / torch.linalg.vector_norm(matrices, torch.inf, (1, 2), keepdim=True).clamp(min=tiny)
    norms = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    x = torch.div(x, norms, out=matrices.new_empty(matrices.shape, dtype=product_dtype(matrices)))  # X_0
    five_steps(x, factor)
    return x.to(matrices.dtype)


def five_steps(matrices: Tensor, factor: float) -> None:
    """Newton-Schulz steps from X_0, in place:  A = X Xᵀ,  X <- a X + (b A + c A²) X, on the smaller side.

    Args:
        matrices: X_0, shape (matrices, rows, columns), contiguous, in the dtype to multiply in.
        factor: what X_5 is multiplied by.
    """
    a, b, c = COEFFICIENTS
    x = out = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    if x.dtype != torch.bfloat16 and x.shape[2] >= 2 * x.shape[1]:
        torch.mul(torch.bmm(polynomial(torch.bmm(x, x.mT)), x), factor, out=out)
        return
    for size, place in ((STEPS - 1) * [(1.0, None)]) + [(factor, out)]:
        gram = torch.bmm(x, x.mT)  # A
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a * size, alpha=size, out=place)


def polynomial(gram: Tensor) -> Tensor:
    """What the five steps multiply X_0 by, of A_0 = X_0 X_0ᵀ alone: with P = a I + b A + c A², X <- P X makes A <- P A P.

    For long matrices that is a third fewer operations. In bfloat16 the errors of A would grow too large.

    Args:
        gram: A_0, shape (matrices, n, n).
    """
    a, b, c = COEFFICIENTS
    product: Tensor | None = None
    for step in range(STEPS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a I
        if step < STEPS - 1:
            gram = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(gram, gram, rest, beta=a)
        if product is None:
            product = rest
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, rest, product, beta=a)
    assert product is not None
    return product


def length(matrices: Tensor) -> float:
    """What polar factors are multiplied by, for a step of the size of Adam's."""
    return RMS * math.sqrt(max(matrices.shape[1:]))


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which matrices are multiplied: bfloat16 on accelerators that have units for it."""
    if like.dtype == torch.float64 or like.device.type in ("cpu", "mps", "meta"):
        return like.dtype
    if like.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return like.dtype
    return torch.bfloat16
