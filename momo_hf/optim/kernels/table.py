"""The one table of kernel sets."""

from typing import NamedTuple

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.compiled import Compiled
from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.method import Method


class Entry(NamedTuple):
    """A kernel set, and the method whose very functions it was written for; None where it serves any."""

    kernels: type[Kernels]
    method: type[Method] | None = None

    def serves(self, method: type[Method]) -> bool:
        """Whether the set does what the method says: a subclass that overrides a function is another method."""
        names = ("buffers", "update_buffers", "precondition", "corrections")
        return self.method is None or all(getattr(method, name) is getattr(self.method, name) for name in names)


# In order of preference; the last one takes everything. Methods put their own sets between the two.
TABLE: list[Entry] = [Entry(Compiled), Entry(Plain)]


def register(kernels: type[Kernels], method: type[Method]) -> None:
    """Add a set that was written for a method; it is preferred to the plain one."""
    TABLE.insert(-1, Entry(kernels, method))


def assign(method: type[Method], buckets: list[Bucket], known: bool) -> list[tuple[type[Kernels], Bucket]]:
    """Find the kernel set of every tensor: the first one in the table that serves the method and takes the tensor.

    `known` says whether loss and gradients are known to be finite or not before the first pass.
    """
    assigned = []
    sets = [entry.kernels for entry in TABLE if entry.serves(method)]
    for rest in buckets:
        for kernels in sets:
            mine, rest = kernels.take(rest, known)
            if mine.roles["param"]:
                assigned.append((kernels, mine))
            if not rest.roles["param"]:
                break
    return assigned
