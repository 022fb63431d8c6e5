"""The plain passes over large tensors, through `torch.compile`."""

import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momo_hf.compat import compile_options
from momo_hf.optim import chunks
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.plain import Plain, first_pass, second_pass
from momo_hf.optim.method import Method


# Tensors in one call of a compiled function; only this number and 1 occur, so that it is compiled twice and not more.
BATCH = 8
# Elements of a row. A loop over whole rows has no remainder, in numbers of elements that the compiler does not know.
ROW = 16


class Compiled(Plain):
    """For groups with `compile`. The compiler makes one loop of each pass, which reads and writes every tensor once.

    Small tensors are left to another set, because copying them into packs costs less than calls of their own, and so are
    the rare ones that have no whole number of rows.
    """

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        if not (bucket.group["compile"] and bucket.moves):
            return bucket.empty, bucket
        return bucket.split(lambda row: fits(row[0].numel()) and all(t.is_contiguous() for t in row))

    @cached_property
    def batches(self) -> list[list[dict[str, Tensor]]]:
        """Tensors as rows, by role. A call costs tens of microseconds; tensors of one size, as layers have them, share it."""
        by_size: dict[int, list[dict[str, Tensor]]] = {}
        for row in zip(*self.bucket.roles.values()):
            # `data` drops the note which tensor it is a view of; the compiler would compile anew for each kind of view.
            rows = [t.view(-1, ROW).data for t in row]
            for t in rows:
                torch._dynamo.mark_static(t, 1)
            by_size.setdefault(row[0].numel(), []).append(dict(zip(self.bucket.roles, rows)))
        batches = []
        for alike in by_size.values():
            full = len(alike) - len(alike) % BATCH
            batches += [alike[i : i + BATCH] for i in range(0, full, BATCH)] + [[one] for one in alike[full:]]
        return batches

    def products(self) -> Tensor:
        roles = [role for role in self.bucket.roles if role != "param" or self.bucket.decays]
        sums = []
        for batch in self.batches:
            function = compiled(first_pass_of_tensors, self.method, len(batch), self.usable is not None)
            tensors = [{role: tensor[role] for role in roles} for tensor in batch]
            sums.append(function(self.method, self.options, tensors, self.weight, self.usable))
        return torch.stack(sums).sum(0)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, sums = self.bucket, []
        roles = [role for role in bucket.roles if role != "grad" or self.usable is None]
        for batch in self.batches:
            function = compiled(second_pass_of_tensors, self.method, len(batch), True)
            tensors = [{role: tensor[role] for role in roles} for tensor in batch]
            step = (self.weight, factor, decay, ok)
            sums.append(function(self.method, self.options, tensors, *step, stored=bucket.stored, **self.how))
        torch.autograd.graph.increment_version(bucket.roles["param"])
        return torch.stack(sums).sum(0)


def fits(numel: int) -> bool:
    return numel >= chunks.PACKED and numel % ROW == 0


def first_pass_of_tensors(
    method: type[Method],
    options: dict[str, Any],
    tensors: list[dict[str, Tensor]],
    weight: Tensor,
    usable: Tensor | None,
) -> Tensor:
    sums = [first_pass(method, options, piece, weight, usable) for piece in wide(tensors, weight)]
    return torch.stack([torch.stack(row) for row in sums]).sum(0)


def second_pass_of_tensors(
    method: type[Method],
    options: dict[str, Any],
    tensors: list[dict[str, Tensor]],
    weight: Tensor,
    *step: Tensor,
    **how: Any,
) -> Tensor:
    rows = []
    for piece, roles in zip(wide(tensors, weight), tensors):
        # Together, tensor by tensor: the compiler makes one loop only of what stands close to each other.
        rows.append(torch.stack(second_pass(method, options, piece, weight, *step, **how)))
        if piece["param"] is not roles["param"]:
            roles["param"].copy_(piece["param"])
    return torch.stack(rows).sum(0)


def wide(tensors: list[dict[str, Tensor]], weight: Tensor) -> Iterator[dict[str, Tensor]]:
    """Tensors by role in the dtype to compute in; they are taken whole and converted in the loop, without a copy."""
    return ({role: tensor.to(weight.dtype) for role, tensor in roles.items()} for roles in tensors)


@functools.cache
def compiled(function: Callable[..., Any], method: type[Method], count: int, writes: bool) -> Callable[..., Any]:
    """A pass over `count` tensors of one size, whichever it is; compiled once for each method and its options."""
    # With sizes, the compiler would also take floats for variable, and torch 2.13 may then find a graph in its cache on
    # disk that has the betas of another run in it.
    constant_floats = torch._dynamo.config.patch(specialize_float=True)
    options = None
    if writes:
        # Otherwise the compiler computes what is written a second time, in a loop of its own, for the sums over it, and
        # leaves out that a parameter rounds.
        options = {"realize_reads_threshold": 1, "emulate_precision_casts": True}
    return constant_floats(torch.compile(function, dynamic=True, options=options, **compile_options()))
