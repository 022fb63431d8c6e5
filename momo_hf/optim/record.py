"""Scalars that belong to the whole model and stand in every parameter group, so that each carries them through a checkpoint."""

from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from momo_hf.optim.tensors.sharding import whole


Group = dict[str, Any]
T = TypeVar("T", bound=NamedTuple)

# Options that describe the one model of all groups and cannot differ between them.
SHARED_OPTIONS = ("beta", "betas", "lb", "use_fstar", "bias_correction", "divide", "averaging")


class Record(Generic[T]):
    """A NamedTuple of tensors in the parameter groups.

    Args:
        made: its class.
        prefix: of the keys in a group.
    """

    def __init__(self, made: type[T], prefix: str = "") -> None:
        self.made = made
        self.keys = tuple(prefix + name for name in made._fields)

    def stands_in(self, group: Group) -> bool:
        """Whether the group has it."""
        return self.keys[0] in group

    def read(self, groups: list[Group]) -> T:
        """The record of the first group, on the device where the scalars live."""
        home = home_of(groups)
        values = map(groups[0].__getitem__, self.keys)
        return self.made(*(value if value.device == home else value.to(home) for value in values))

    def first(self, groups: list[Group]) -> Tensor:
        """Its first number alone, likewise."""
        return groups[0][self.keys[0]].to(home_of(groups))

    def write(self, groups: list[Group], values: T) -> None:
        """Store it in every group: all have the same tensors."""
        head, *others = groups
        keep([(head, key) for key in self.keys], values)
        for group in others:
            group.update({key: head[key] for key in self.keys})

    def widen(self, groups: list[Group], dtype: torch.dtype) -> None:
        """Give every group the record of the first in a dtype, and zeros for what it has not."""
        zero = torch.zeros((), device=home_of(groups))
        self.write(groups, self.made(*(groups[0].get(key, zero.clone()).to(dtype) for key in self.keys)))


def home_of(groups: list[Group]) -> torch.device:
    """Where the scalars live: with the first parameter that has memory."""
    params = (p for group in groups for p in group["params"])
    return next((p.device for p in params if p.device.type != "meta"), torch.device("cpu"))


def params_of(groups: list[Group]) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [p for group in groups for p in group["params"]]


def beta_of(group: Group) -> float:
    """β of the averages of a group."""
    return group["beta"] if "beta" in group else group["betas"][0]


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or a tensor with one element, as a 0-dim tensor with dtype and device of another one."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device)
    return whole(value).to(like.device, like.dtype).reshape(())


def keep(entries: Iterable[tuple[Group, str]], values: Iterable[Tensor]) -> None:
    """Write numbers into the tensors that stand under their keys: a CUDA graph reads and writes where it did when it was
    captured. Only what has another device or dtype, or is not there, takes a new place.

    Args:
        entries: for every number the dictionary, mostly a parameter group, and its key.
        values: the numbers, tensors or, of what is there on a CPU, Python's.
    """
    entries, values = list(entries), list(values)
    held = [group[key] for group, key in entries if key in group]
    if values and not isinstance(values[0], Tensor):
        for (group, key), value in zip(entries, values):
            if key not in group:
                group[key] = torch.zeros((), dtype=torch.float32, device="cpu")
            group[key].fill_(value)
        return
    if len(held) == len(values) and all(h.device == v.device and h.dtype == v.dtype for h, v in zip(held, values)):
        torch._foreach_copy_(held, values)
    else:
        for (group, key), value in zip(entries, values):
            group[key] = value
