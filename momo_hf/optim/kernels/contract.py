"""What a kernel set is: the two passes of a step over the tensors of one bucket."""

from abc import ABC, abstractmethod

from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.method import Method


class Kernels(ABC):
    """The two passes over the tensors of one bucket in one step.

    A step is a transaction. The first pass computes the inner products from what momentum and buffers are going to be,
    and writes nothing; the second pass writes, with a step size that is known to be finite, or leaves everything as it
    was. That costs one more read of the gradient than writing the momentum at once, and needs no collective of its own
    to find out that another process met a NaN. `ok` is a tensor, so no value is read back.

    An object lives for one step, so that the second pass may use what the first one has prepared. A set says by `take`
    which tensors it serves; a set that knows one method only is registered for that method (see `table`).

    Args:
        method: the class whose buffers, `update_buffers`, `precondition` and `corrections` count.
        bucket: the tensors, at least one.
        weight: 1-β_k, 0-dim, on the bucket's device and in its dtype to compute in.
        step: k, 0-dim, likewise.
    """

    def __init__(self, method: type[Method], bucket: Bucket, weight: Tensor, step: Tensor) -> None:
        self.method = method
        self.bucket = bucket
        self.weight = weight
        self.step = step

    @classmethod
    @abstractmethod
    def take(cls, bucket: Bucket) -> tuple[Bucket, Bucket]:
        """Divide a bucket into what this set serves and what it leaves to the next one; either may be empty."""

    @abstractmethod
    def products(self) -> Tensor:
        """First pass, over a bucket that moves: <d, u>, <d, x> and <g, D^{-1} g>, shape (3,), of this process's part.

        <d, x> is 0 where the bucket does not decay, <g, D^{-1} g> where the samples' slope is not asked for.
        """

    @abstractmethod
    def overlap(self) -> Tensor:
        """<d, x> of this process's part with momentum and parameters as they are, 0-dim."""

    @abstractmethod
    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        """Second pass: momentum, buffers and, where the bucket moves, parameters, in place.

        x <- (x - τ r u) / (1 + a), or AdamW's x <- (1 - a) x - τ r u where not `divide`. Autograd must see that the
        parameters changed.

        Args:
            factor: τ r_g; 0 where not `ok`.
            decay: a_g; 0 where not `ok`.
            ok: 0-dim bool; where it is False everything stays as it was, also beside gradients that are not finite.

        Returns:
            <d, x> after the step and <d, what rounding x to its dtype added>, shape (2,), of this process's part.
        """
