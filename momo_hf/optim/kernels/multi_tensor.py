"""The passes of MoMo and MoMo-Adam over lists of tensors on an accelerator, by kernels in Triton: a set for each kind of step."""

import functools
import math
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.kernels import launch
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import in_one_order


class Tables(NamedTuple):
    """Where the tensors of a bucket are, on their device.

    Attributes:
        places: a row per tensor: its size, the addresses of its roles and its first block.
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
    odd = [size % 4 != 0 or any(address % 16 for address in addresses) for size, *addresses in zip(sizes, *columns)]
    starts = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, block)]
    starts.sort(key=lambda place: odd[place[0]])
    first = {i: row for row, (i, start) in enumerate(starts) if start == 0}
    rows = [(*row, first.get(i, 0)) for i, row in enumerate(zip(sizes, *columns))]
    places = torch.tensor(rows, dtype=torch.int64, device=device)
    blocks = torch.tensor(starts, dtype=torch.int64, device=device).view(-1, 2)
    return Tables(places, blocks, sum(not odd[i] for i, _ in starts))


class MultiTensor(Plain):
    """Base of the sets, in float32: reads and writes every tensor as often as the kind of step says, and copies none.

    Attributes:
        columns: the roles in a row of the table of addresses; a parameter may have none in some.
    """

    columns: ClassVar[tuple[str, ...]]
    corrects = True

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        fits = bucket.moves and bucket.dtype == torch.float32 and launch.runs_on(bucket.device)
        if not fits or len({g.dtype for g in bucket.roles["grad"]}) > 1:
            return bucket.empty, bucket
        if bucket.method.whole:
            return bucket.split(lambda row: all(map(Tensor.is_contiguous, row)))
        return bucket.split(in_one_order)

    @cached_property
    def block(self) -> int:
        from momo_hf.optim.kernels import triton_tensors

        return triton_tensors.BLOCK

    @cached_property
    def tables(self) -> Tables:
        sizes = tuple(map(Tensor.numel, self.bucket.roles["param"]))
        return tables_of(tuple(map(self.column, self.columns)), sizes, self.bucket.device, self.block)

    def column(self, role: str) -> tuple[int, ...]:
        """Where the tensors of a role are."""
        return tuple(t.data_ptr() for t in self.bucket.roles.get(role, ())) or (0,) * len(self.bucket.roles["param"])

    @property
    def all_directions(self) -> Tensor:
        """Where a costly method has its directions; for others a tensor that is not read."""
        return self.tables.places

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What the code for a method is made for: with v, without, or with a direction that is made before."""
        how = {"adam": bool(self.method.buffers), "costly": self.method.costly, "finite_known": self.how.finite_known}
        if not self.method.buffers:
            return how | {"beta2": 0.0, "log_beta2": 0.0, "eps": 0.0}
        beta2 = self.bucket.options["betas"][1]
        return how | {"beta2": beta2, "log_beta2": log_of(beta2), "eps": self.bucket.options["eps"]}

    @cached_property
    def momentum(self) -> dict[str, Any]:
        """What the code for the momentum is made for."""
        return {"log_beta": log_of(self.bucket.beta), "corrects": bool(self.bucket.group["bias_correction"])}

    @cached_property
    def types(self) -> dict[str, Any]:
        """The dtypes that differ from bucket to bucket."""
        param, grad = (triton_dtype(self.bucket.roles[role][0].dtype) for role in ("param", "grad"))
        return {"param_dtype": param, "grad_dtype": grad}

    @property
    def inputs_valid(self) -> Tensor:
        """Whether the first pass may write; not read where nobody knows."""
        return self.now.step if self.now.inputs_valid is None else self.now.inputs_valid

    def run(self, kernel: Any, width: int, *numbers: Tensor, **how: Any) -> Tensor:
        """Run a pass; its sums over all blocks, shape (width,)."""
        sums = self.over_blocks(kernel, width, *numbers, **how, **self.constants)
        return sums.sum(0) if width else sums.view(0)

    def over_blocks(self, kernel: Any, width: int, *numbers: Tensor, **how: Any) -> Tensor:
        """Run a kernel over all blocks; what it finds in them, shape (blocks, width)."""
        tables = self.tables
        counts = [tables.aligned, len(tables.blocks) - tables.aligned]
        sums = self.now.weight.new_empty(len(tables.blocks), width)
        for aligned, blocks, found in zip((True, False), tables.blocks.split(counts), sums.split(counts)):
            if len(blocks):
                given = (tables.places, blocks, self.all_directions, *((found,) if width else ()), *numbers)
                launch.launch(kernel, len(blocks), *given, **how, aligned=aligned, block=self.block)
        return sums


class MultiTensorModelled(MultiTensor):
    """The paper's step."""

    columns = ("param", "grad", "exp_avg_sq", "exp_avg", "", "")

    def first(self) -> Tensor:
        from momo_hf.optim.kernels import triton_passes

        numbers = (self.now.step, self.now.weight, self.inputs_valid)
        how = self.types | self.momentum | {"decays": self.how.decays}
        return self.run(triton_passes.first_pass, len(self.kind.SUMS), *numbers, **how)

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        from momo_hf.optim.kernels import triton_passes

        how = self.types | self.momentum | {"decays": self.how.decays, "divide": self.how.divide}
        given = (self.now.step, self.now.weight, *numbers)
        found = self.run(triton_passes.second_pass, len(self.kind.LEFT), *given, **how)
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return found


class MultiTensorAveraged(MultiTensor):
    """The step that averages."""

    columns = ("param", "grad", "exp_avg_sq", "exp_avg", "ahead", "y")

    @cached_property
    def constants(self) -> dict[str, Any]:
        return super().constants | {"bound": self.how.bound}

    def numbers(self, update: Any) -> tuple[Tensor, ...]:
        """What the kernel makes the numbers of the second pass from."""
        column = self.bucket.column
        found = (update.factor.select(0, column), update.decay.select(0, column), update.weight, update.accepted)
        return tuple(self.number_for(self.bucket, number) for number in found)

    def first(self) -> Tensor:
        from momo_hf.optim.kernels import triton_averaged

        how = {"grad_dtype": self.types["grad_dtype"], "shrinks": self.how.decays and self.how.divide}
        numbers = (self.now.step, self.now.weight, self.inputs_valid)
        return self.run(triton_averaged.first_pass, len(self.kind.SUMS), *numbers, **how)

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        from momo_hf.optim.kernels import triton_averaged

        interpolation = self.how.interpolation
        how = self.types | {"decays": self.how.decays, "divide": self.how.divide}
        late = 0 if self.bucket.start is None else self.bucket.group["averaging_power"]
        how |= {"interpolation": interpolation, "to_x": 1 / interpolation - 1, "late": late}
        found = self.run(triton_averaged.second_pass, 0, self.now.step, self.now.weight, *numbers, **how)
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return found


class MultiTensorRamp(MultiTensor):
    """A step of the search."""

    columns = ("param", "grad", "exp_avg_sq", "exp_avg", "origin", "last_direction")

    def first(self) -> Tensor:
        from momo_hf.optim.kernels import triton_ramp

        how = self.momentum | {"grad_dtype": self.types["grad_dtype"]}
        numbers = (self.now.step, self.now.weight, self.inputs_valid)
        return self.run(triton_ramp.first_pass, len(self.kind.SUMS), *numbers, **how)

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        from momo_hf.optim.kernels import triton_ramp

        how = self.types | self.momentum
        found = self.run(triton_ramp.second_pass, 0, self.now.step, self.now.weight, *numbers, **how)
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return found


def log_of(beta: float) -> float:
    """The logarithm of a β of an average."""
    return math.log(beta) if beta > 0 else -math.inf


def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
