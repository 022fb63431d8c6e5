"""What a kernel set is: the two passes of a step over the tensors of one bucket."""

from abc import ABC, abstractmethod

from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.method import Method


class Kernels(ABC):
    """The two passes over the tensors of one bucket in one step.

    A step is a transaction: it writes all, or nothing where loss or gradients are not finite. Which is known before the
    step where all gradients were clipped together, or where this process has all of every gradient and looks at their
    norm (`usable`). Then the first pass writes momentum and buffers at once: it reads g, m, v and writes m, v, the second
    one reads m, v, x and writes x. Where other processes hold parts of the gradients, nothing may be written before the
    one sum over all of them. Then the first pass reads g, m, v and the second one reads g, m, v, x and writes m, v, x;
    that costs one more read of the gradient, and no collective of its own to find out that another process met a NaN.
    `usable` and `ok` are tensors, so no value is read back.

    An object lives for one step, so that the second pass may use what the first one has prepared. A set says by `take`
    which tensors it serves; a set that knows one method only is registered for that method (see `table`).

    Args:
        method: the class whose buffers, `update_buffers`, `precondition` and `corrections` count.
        bucket: the tensors, at least one.
        weight: 1-β_k, 0-dim, on the bucket's device and in its dtype to compute in.
        step: k, 0-dim, likewise.
        usable: 0-dim bool on the bucket's device, whether loss and gradients are finite; None where nobody knows yet.
    """

    def __init__(
        self, method: type[Method], bucket: Bucket, weight: Tensor, step: Tensor, usable: Tensor | None
    ) -> None:
        self.method = method
        self.bucket = bucket
        self.weight = weight
        self.step = step
        self.usable = usable

    @classmethod
    @abstractmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        """Divide a bucket into what this set serves and what it leaves to the next one; either may be empty.

        Args:
            bucket: the tensors.
            known: whether `usable` is going to be given.
        """

    @abstractmethod
    def products(self) -> Tensor:
        """First pass, over a bucket that moves: <d, u>, <d, x> and |g|², shape (3,), of this process's part.

        <d, x> is 0 where the bucket does not decay, and |g|² where `usable` is given. There momentum and buffers are
        written, unless it is False.
        """

    @abstractmethod
    def overlap(self) -> Tensor:
        """<d, x> of this process's part with momentum and parameters as they are, 0-dim."""

    @abstractmethod
    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        """Second pass: momentum and buffers, if the first pass has not, and where the bucket moves parameters, in place.

        x <- (x - τ r u) / (1 + a), or AdamW's x <- (1 - a) x - τ r u where not `divide`. Autograd must see that the
        parameters changed.

        Args:
            factor: τ r_g; 0 where not `ok`.
            decay: a_g; 0 where not `ok`.
            ok: 0-dim bool; where it is False everything stays as it was, also beside gradients that are not finite.

        Returns:
            <d, x> after the step and <d, what rounding x to its dtype added>, shape (2,), of this process's part.
        """
