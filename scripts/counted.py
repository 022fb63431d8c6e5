"""Counts what operators do to tensors: calls, bytes, memory, and what a CUDA graph could not capture."""

from collections import Counter
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
# These compute nothing, and ask for memory at most.
FREE = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach"}


def tensors_in(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def size_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Counted(TorchDispatchMode):
    """Counts what is done to tensors on a type of device; compiled code and kernels in Triton go unseen.

    Attributes:
        calls: by name of the operator; a view is none.
        bytes: of every tensor that a call reads, and of every tensor that it writes.
        copies: calls that bring something from the host to the device.
        reads: calls that bring a value from the device to the host.
        peak: bytes that were held at most beyond what was there before.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type
        self.calls: Counter[str] = Counter()
        self.bytes = self.held = self.peak = 0
        self.copies: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, schema = kwargs or {}, func._schema.name, func._schema
        given = tensors_in((args, kwargs))
        on_device = self._here(given) != []
        if name in READS and on_device and self.device_type != "cpu":
            self.reads.append(name)
            raise AssertionError(f"{func} reads a value back")
        made = func(*args, **kwargs)
        results = self._here(tensors_in(made))
        if given and not on_device and results:
            self.copies.append(name)
        if on_device and len(results) < len(tensors_in(made)):
            self.reads.append(name)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not (on_device or results) or view or func.namespace in ("prim", "profiler"):
            return made
        if name not in FREE:
            self.calls[name] += 1
            changed = [args[i] for i, a in enumerate(schema.arguments[: len(args)]) if _written(a)]
            changed += [kwargs[a.name] for a in schema.arguments if _written(a) and a.name in kwargs]
            written = {id(t): t for t in tensors_in((results, changed))}
            self.bytes += size_of(given) + size_of(list(written.values()))
        there = {t.untyped_storage()._cdata for t in given}
        self._hold([t for t in results if t.untyped_storage()._cdata not in there])
        return made

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def _here(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t for t in tensors if t.device.type == self.device_type]

    def launched(self) -> None:
        self.calls["triton"] += 1

    def _hold(self, results: list[Tensor]) -> None:
        for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in results}.values():
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.held -= size


def _written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
