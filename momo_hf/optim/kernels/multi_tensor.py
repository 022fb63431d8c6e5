"""The passes of MoMo and MoMo-Adam over lists of tensors on an accelerator, by kernels in Triton."""

import functools
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels import launch
from momo_hf.optim.kernels.plain import Plain


class Tables(NamedTuple):
    """Where the tensors of a bucket are, on their device.

    Attributes:
        places: a row per tensor: the addresses of its roles and its size.
        blocks: a row per block: its tensor, and where in it the block begins.
        aligned: the number of the first blocks, whose tensors can be read and written in 16 bytes at a time, in float32.
    """

    places: Tensor
    blocks: Tensor
    aligned: int


@functools.lru_cache(maxsize=32)
def tables_of(
    columns: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device, block: int
) -> Tables:
    """Make the tables. The tensors of most training loops come back to the same places at every step, and then nothing is
    copied to the device.

    Args:
        columns: the addresses of the tensors of every role.
        sizes: their numbers of elements.
        device: where they are.
        block: elements of a block.
    """
    rows = list(zip(*columns, sizes))
    odd = [size % 4 != 0 or any(address % 16 for address in addresses) for *addresses, size in rows]
    starts = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, block)]
    starts.sort(key=lambda place: odd[place[0]])
    places = torch.tensor(rows, dtype=torch.int64, device=device)
    blocks = torch.tensor(starts, dtype=torch.int64, device=device).view(-1, 2)
    return Tables(places, blocks, sum(not odd[i] for i, _ in starts))


class MultiTensor(Plain):
    """For MoMo in float32; reads and writes every tensor as often as the contract says, and copies none."""

    adam = False

    @classmethod
    def take(cls, bucket: Bucket, known: bool) -> tuple[Bucket, Bucket]:
        fits = bucket.moves and bucket.dtype == torch.float32 and launch.runs_on(bucket.device)
        if not fits or len({g.dtype for g in bucket.roles["grad"]}) > 1:
            return bucket.empty, bucket
        return bucket.split(lambda row: all(map(Tensor.is_contiguous, row)))

    @cached_property
    def passes(self) -> Any:
        from momo_hf.optim.kernels import triton_passes

        return triton_passes

    @cached_property
    def tables(self) -> Tables:
        roles = list(self.bucket.roles.values())
        columns = [tuple(t.data_ptr() for t in tensors) for tensors in roles]
        sizes = tuple(map(Tensor.numel, roles[0]))
        columns += [(0,) * len(sizes)] * (4 - len(columns))
        return tables_of(tuple(columns), sizes, self.bucket.device, self.passes.BLOCK)

    def run(self, kernel: Any, width: int, *numbers: Tensor, **how: bool) -> Tensor:
        """Run a pass over all blocks; the sums over them, shape (width,)."""
        options, roles, tables = self.bucket.options, self.bucket.roles, self.tables
        sums = self.weight.new_empty(len(tables.blocks), width)
        counts = [tables.aligned, len(tables.blocks) - tables.aligned]
        for aligned, blocks, found in zip((True, False), tables.blocks.split(counts), sums.split(counts)):
            if not len(blocks):
                continue
            launch.launch(
                kernel,
                len(blocks),
                *(tables.places, blocks, found, *numbers),
                param_dtype=triton_dtype(roles["param"][0].dtype),
                grad_dtype=triton_dtype(roles["grad"][0].dtype),
                beta2=options["betas"][1] if self.adam else 0.0,
                eps=options["eps"] if self.adam else 0.0,
                adam=self.adam,
                decays=self.bucket.decays,
                known=self.usable is not None,
                aligned=aligned,
                block=self.passes.BLOCK,
                **how,
            )
        return sums.sum(0)

    @cached_property
    def correction(self) -> Tensor:
        return self.options["rsqrt_correction2"] if self.adam else self.weight

    def products(self) -> Tensor:
        ok = self.weight if self.usable is None else self.usable  # not read where it is None
        return self.run(self.passes.first_pass, 3, self.weight, self.correction, ok)

    def write(self, factor: Tensor, decay: Tensor, ok: Tensor) -> Tensor:
        numbers = (self.weight, self.correction, factor, decay, ok)
        found = self.run(self.passes.second_pass, 2, *numbers, divide=self.bucket.group["divide"])
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return found


class MultiTensorAdam(MultiTensor):
    """The same for MoMo-Adam."""

    adam = True


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
