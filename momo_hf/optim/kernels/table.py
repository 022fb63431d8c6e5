"""The one table of kernel sets."""

import functools
from typing import NamedTuple

from momo_hf.optim.adam import Adam
from momo_hf.optim.kernels.compiled import Compiled, CompiledRest
from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.kernels.fused_steps import (
    FusedAdamAveraged,
    FusedAdamModelled,
    FusedAdamRamp,
    FusedMomentumAveraged,
    FusedMomentumModelled,
)
from momo_hf.optim.kernels.multi_tensor import MultiTensorAveraged, MultiTensorModelled, MultiTensorRamp
from momo_hf.optim.kernels.multi_tensor_muon import MuonAveraged, MuonModelled, MuonRamp
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.method import Method
from momo_hf.optim.muon import Muon
from momo_hf.optim.steps.averaged import Averaged
from momo_hf.optim.steps.kind import Kind
from momo_hf.optim.steps.modelled import Modelled
from momo_hf.optim.steps.ramp import Ramp
from momo_hf.optim.tensors.buckets import Bucket


class Entry(NamedTuple):
    """A kernel set, and the kind of step and the method that it was written for; None where it serves any."""

    kernels: type[Kernels]
    kind: type[Kind] | None = None
    method: type[Method] | None = None

    def serves(self, kind: type[Kind], method: Method) -> bool:
        """Whether the set does what the method says."""
        right_kind = self.kind is None or kind is self.kind
        return right_kind and (self.method is None or written_for(self, method))


@functools.cache
def written_for(entry: Entry, method: Method) -> bool:
    """Whether a method is the one of an entry: a subclass that overrides a function or a flag is another."""
    functions = ("update", "direction", "corrections", "sample")
    values = ("buffers", "whole", "costly", "keeps_momentum")
    return all(getattr(type(method), name) is getattr(entry.method, name) for name in functions) and all(
        getattr(method, name) == getattr(entry.method, name) for name in values
    )


# In order of preference; the last one takes everything.
TABLE: tuple[Entry, ...] = (
    Entry(Compiled),
    Entry(FusedMomentumModelled, Modelled, Method),
    Entry(FusedMomentumAveraged, Averaged, Method),
    Entry(FusedAdamModelled, Modelled, Adam),
    Entry(FusedAdamAveraged, Averaged, Adam),
    Entry(FusedAdamRamp, Ramp, Adam),
    *(Entry(MultiTensorModelled, Modelled, method) for method in (Method, Adam)),
    *(Entry(MultiTensorAveraged, Averaged, method) for method in (Method, Adam)),
    *(Entry(MultiTensorRamp, Ramp, method) for method in (Method, Adam)),
    Entry(MuonModelled, Modelled, Muon),
    Entry(MuonAveraged, Averaged, Muon),
    Entry(MuonRamp, Ramp, Muon),
    Entry(CompiledRest),
    Entry(Plain),
)


def assign(kind: type[Kind], buckets: list[Bucket], finite_known: bool) -> list[tuple[type[Kernels], Bucket]]:
    """Find the kernel set of every tensor: the first one in the table that serves it and takes it.

    `finite_known` says whether loss and gradients are known to be finite or not before the first pass.
    """
    assigned = []
    for rest in buckets:
        for kernels in (entry.kernels for entry in TABLE if entry.serves(kind, rest.method)):
            mine, rest = kernels.take(rest, finite_known)
            if mine.roles["param"]:
                assigned.append((kernels, mine))
            if not rest.roles["param"]:
                break
    return assigned
