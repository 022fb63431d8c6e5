"""Arithmetic for the scalar sides: torch's functions, on tensors or on Python's numbers.

On a device a scalar is a 0-dim tensor, so that no value is read back. On a CPU reading costs nothing, and an operator on a
tensor takes as long as dozens on Python's numbers; there the formulas get floats and bools in place of 0-dim tensors, and a
`Vector` in place of a 1-dim one. Type hints say Tensor for all of them.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from ctypes import c_float
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


# The largest number in float32, in which what was computed here is kept.
LARGEST = torch.finfo(torch.float32).max


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[["Vector", Any], "Vector"]:
    def apply(self: "Vector", other: Any) -> "Vector":
        return Vector(map(function, self, other if isinstance(other, Vector) else repeat(other)))

    return apply


class Vector:
    """Python's numbers, as many as parameter groups, with what the formulas use of a 1-dim tensor."""

    __slots__ = ("_values",)

    def __init__(self, values: Iterable[float]) -> None:
        self._values = tuple(values)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def select(self, dim: int, index: int) -> float:
        return self._values[index]

    __add__ = __radd__ = _elementwise(operator.add)
    __mul__ = __rmul__ = _elementwise(operator.mul)
    __rsub__ = _elementwise(lambda x, y: y - x)
    __truediv__ = _elementwise(lambda x, y: divided(x, y))

    def sum(self) -> float:
        return sum(self._values)

    def max(self) -> float:
        return max(self._values)

    def min(self) -> float:
        return min(self._values)


def for_formulas(like: Tensor, *records: Any) -> tuple[Any, ...]:
    """Tensors, and NamedTuples of them, as the formulas are to get them.

    Args:
        like: a scalar of the model, which stands where the others do.
        records: those; what is neither stays what it is.
    """
    return tuple(map(_read, records)) if on_host(like) else records


def on_host(like: Tensor) -> bool:
    """Whether a number stands where reading costs nothing, and is no larger than float32 holds."""
    return type(like) is Tensor and like.is_cpu and like.dtype == torch.float32


def _read(record: Any) -> Any:
    if isinstance(record, tuple):
        return type(record)._make(map(_read, record))  # type: ignore[attr-defined]
    if isinstance(record, Tensor):
        return Vector(record.tolist()) if record.dim() else record.item()
    return record


def full_like(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value) if isinstance(like, Tensor) else value


def like(other: Tensor, number: Tensor) -> Tensor:
    """A number with dtype and device of another one."""
    return number.to(other) if isinstance(other, Tensor) else float(number)


def where(condition: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    if not condition and isinstance(yes, Vector) and not isinstance(no, Vector):
        return Vector(repeat(no, len(yes)))
    return yes if condition else no


def divided(x: Tensor, y: Tensor | float) -> Tensor:
    """x / y, which may be 0."""
    return x / y if isinstance(y, Tensor) or y else x * math.inf


def quotient(x: Tensor, y: Tensor, otherwise: float) -> Tensor:
    """x / y where y > 0."""
    return where(y > 0, divided(x, y), otherwise)


def lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return start.lerp(end, weight) if isinstance(start, Tensor) else start + weight * (end - start)


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, rounded as it is kept, and no more than can be kept."""
    return x + y if isinstance(x, Tensor) else c_float(min(max(x + y, -LARGEST), LARGEST)).value


def expm1(x: Tensor) -> Tensor:
    return x.expm1() if isinstance(x, Tensor) else math.expm1(x)


def minimum(x: Tensor, y: Tensor | float) -> Tensor:
    """The smaller of two numbers, NaN if x is."""
    if isinstance(x, Tensor):
        return x.minimum(y) if isinstance(y, Tensor) else x.clamp(max=y)
    return y if y < x else x


def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    """The larger of two numbers, NaN if x is."""
    if isinstance(x, Tensor):
        return x.maximum(y) if isinstance(y, Tensor) else x.clamp(min=y)
    return y if y > x else x


def largest(like: Tensor) -> float:
    """The largest number of its dtype."""
    return torch.finfo(like.dtype).max if isinstance(like, Tensor) else LARGEST


def root(x: Tensor) -> Tensor:
    """√x, NaN below 0."""
    if isinstance(x, Tensor):
        return x.sqrt()
    return math.sqrt(x) if x >= 0 else math.nan


def or_else(x: Tensor, value: float) -> Tensor:
    """x, or a value where it is infinite or NaN."""
    if isinstance(x, Tensor):
        return x.nan_to_num(value, value, value)
    return x if math.isfinite(x) else value


def all_finite(numbers: Iterable[Tensor]) -> Tensor:
    """Whether no number is infinite or NaN, or of Python's too large to be kept."""
    first, *others = numbers
    if isinstance(first, Tensor):
        joined = torch.cat([number.reshape(-1) for number in (first, *others)])
        return _finite(joined)
    flat = (value for number in (first, *others) for value in (number if isinstance(number, Vector) else (number,)))
    return all(abs(value) <= LARGEST for value in flat)


def transaction(new: Iterable[Tensor], old: Iterable[Tensor], others: Iterable[Tensor], valid: Tensor) -> Any:
    """Take all numbers or none.

    Args:
        new: what is to be written; 0-dim, as `others`.
        old: what is there.
        others: what has to be finite too.
        valid: whether the new numbers can be taken at all, bool.

    Returns:
        The numbers to write, the old ones where anything is not finite; and whether they are the new ones.
    """
    new, old = [*new], [*old]
    if not isinstance(valid, Tensor):
        ok = valid and all_finite([*new, *others])
        return (new if ok else old), ok
    numbers, before = torch.stack([*new, *others]), torch.stack(old)
    ok = _finite(numbers) & valid
    return torch.where(ok, numbers.narrow(0, 0, len(old)), before).to(before.dtype).unbind(), ok


def _finite(numbers: Tensor) -> Tensor:
    # Only of infinities and NaN a difference to itself is not 0.
    return (numbers - numbers).any().logical_not()
