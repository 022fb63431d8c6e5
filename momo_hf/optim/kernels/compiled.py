"""The plain passes over large tensors, through `torch.compile`."""

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momo_hf.compat import compile_options
from momo_hf.optim import chunks
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.plain import Plain, products_of_piece, write_piece
from momo_hf.optim.method import Method


# Tensors in one call of a compiled function; only this number and 1 occur, so that it is compiled twice and not more.
BATCH = 8


class Compiled(Plain):
    """For groups with `compile`. The compiler makes one loop of each pass, which reads and writes every tensor once.

    Small tensors are left to another set, because copying them into packs costs less than calls of their own.
    """

    @classmethod
    def take(cls, bucket: Bucket) -> tuple[Bucket, Bucket]:
        if not (bucket.group["compile"] and bucket.moves):
            return bucket.empty, bucket
        return bucket.split(lambda row: row[0].numel() >= chunks.PACKED and all(t.is_contiguous() for t in row))

    @cached_property
    def batches(self) -> list[list[dict[str, Tensor]]]:
        """Flat tensors by role. A call costs tens of microseconds; tensors of one size, as layers have them, share it."""
        by_size: dict[int, list[dict[str, Tensor]]] = {}
        for row in zip(*self.bucket.roles.values()):
            # `data` drops the note which tensor it is a view of; the compiler would compile anew for each kind of view.
            flat = dict(zip(self.bucket.roles, (t.view(-1).data for t in row)))
            by_size.setdefault(row[0].numel(), []).append(flat)
        batches = []
        for alike in by_size.values():
            full = len(alike) - len(alike) % BATCH
            batches += [alike[i : i + BATCH] for i in range(0, full, BATCH)] + [[one] for one in alike[full:]]
        return batches

    def products(self) -> Tensor:
        roles = [role for role in self.bucket.roles if role != "param" or self.bucket.decays]
        sums = []
        for batch in self.batches:
            function = compiled(products_of_tensors, self.method, len(batch))
            tensors = [{role: tensor[role] for role in roles} for tensor in batch]
            sums.append(function(self.method, self.options, tensors, self.weight, self.bucket.sampled))
        return torch.stack(sums).sum(0)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        bucket, sums = self.bucket, []
        how = {"stored": bucket.stored, "moves": True, "decays": bucket.decays, "divide": bucket.group["divide"]}
        for batch in self.batches:
            function = compiled(write_tensors, self.method, len(batch))
            sums.append(function(self.method, self.options, batch, self.weight, factor, decay, ok, **how))
        torch.autograd.graph.increment_version(bucket.roles["param"])
        return torch.stack(sums).sum(0)


def products_of_tensors(
    method: type[Method], options: dict[str, Any], tensors: list[dict[str, Tensor]], weight: Tensor, sampled: bool
) -> Tensor:
    rows = []
    for roles in tensors:
        # Tensors are taken whole and converted in the loop, without a copy.
        piece = {role: tensor.to(weight.dtype) for role, tensor in roles.items()}
        # Together, tensor by tensor: the compiler makes one loop only of what stands close to each other.
        rows.append(torch.stack(products_of_piece(method, options, piece, weight, sampled)))
    return torch.stack(rows).sum(0)


def write_tensors(
    method: type[Method], options: dict[str, Any], tensors: list[dict[str, Tensor]], *step: Any, **how: Any
) -> Tensor:
    weight, rows = step[0], []
    for roles in tensors:
        piece = {role: tensor.to(weight.dtype) for role, tensor in roles.items()}
        rows.append(torch.stack(write_piece(method, options, piece, *step, **how)))
        for role, tensor in roles.items():
            if role != "grad" and tensor.dtype != weight.dtype:
                tensor.copy_(piece[role])
    return torch.stack(rows).sum(0)


@functools.cache
def compiled(function: Callable[..., Any], method: type[Method], count: int) -> Callable[..., Any]:
    """A pass over `count` tensors of one size, whichever it is; compiled once for each method and its options."""
    # With sizes, the compiler would also take floats for variable, and torch 2.13 may then find a graph in its cache on
    # disk that has the betas of another run in it.
    constant_floats = torch._dynamo.config.patch(specialize_float=True)
    options = None
    if function is write_tensors:
        # Otherwise the compiler computes what is written a second time, in a loop of its own, for the sums over it, and
        # leaves out that a parameter rounds.
        options = {"realize_reads_threshold": 1, "emulate_precision_casts": True}
    return constant_floats(torch.compile(function, dynamic=True, options=options, **compile_options()))
