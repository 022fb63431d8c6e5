"""What a kernel set is: the two passes of a step over the tensors of one bucket."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from momo_hf.optim.steps.kind import How, Kind, Now
from momo_hf.optim.tensors.buckets import Bucket


class Kernels(ABC):
    """The two passes over the tensors of one bucket in one step.

    Whether loss and gradients are finite is known before the step where all gradients were clipped together, or where this
    process has all of every gradient and looks at their norm (`now.inputs_valid`). Then the first pass writes averages and
    buffers at once. Where other processes hold parts of the gradients, nothing may be written before the one sum over all
    of them, and the second pass takes the gradients in; that costs one more read of them, and no collective of its own to
    find out that another process met a NaN. All are tensors, so no value is read back, but for a set that `reads`.

    An object lives for one step, so that the second pass may use what the first one has prepared. A set says by `take`
    which tensors it serves; a set that knows one kind of step and one method only is registered for them (see `table`).

    Args:
        kind: of the step; its passes are what counts.
        bucket: the tensors, at least one.
        now: the numbers of the step.

    Attributes:
        corrects: whether the set makes ρ and the method's corrections from k itself; then `now` is without them.
        reads: whether it reads the numbers of a step, as is free on a CPU; then they are Python's.
    """

    corrects: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    def __init__(self, kind: type[Kind], bucket: Bucket, now: Now) -> None:
        self.kind = kind
        self.method = bucket.method
        self.bucket = bucket
        self.now = now
        self.how = How(
            moves=bucket.moves,
            decays=bucket.decays,
            divide=bucket.group["divide"],
            finite_known=now.inputs_valid is not None,
            stored=bucket.stored,
            interpolation=float(bucket.group["averaging"]),
            bound=bucket.method.table_bound if bucket.table else None,
        )

    @classmethod
    @abstractmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        """Divide a bucket into what this set serves and what it leaves to the next one; either may be empty.

        Args:
            bucket: the tensors.
            finite_known: whether `now.inputs_valid` is going to be given.
        """

    def numbers(self, update: Any) -> tuple[Tensor, ...]:
        """What `second` is given of the step that the kind has decided on."""
        found = self.kind.numbers(update, self.bucket, self.now)
        return tuple(self.number_for(self.bucket, number) for number in found)

    @classmethod
    def number_for(cls, bucket: Bucket, number: Tensor | float) -> Any:
        """A number of a step as the set gets it: Python's, or where the bucket is, in the dtype it computes in unless it is a
        flag.
        """
        if cls.reads:
            return number.item() if isinstance(number, Tensor) else number
        if isinstance(number, Tensor):
            return number.to(bucket.device, None if number.dtype == torch.bool else bucket.dtype)
        dtype = torch.bool if isinstance(number, bool) else bucket.dtype
        return torch.full((), number, dtype=dtype, device=bucket.device)

    @abstractmethod
    def first(self) -> Tensor:
        """First pass, over a bucket that moves: what the kind's `SUMS` name, over this process's part, 1-dim."""

    @abstractmethod
    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        """Second pass, in place; autograd must see that the parameters changed.

        Args:
            numbers: from `numbers`.

        Returns:
            What the kind's `LEFT` names, over this process's part, 1-dim.
        """
