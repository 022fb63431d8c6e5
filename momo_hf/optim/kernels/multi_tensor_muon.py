"""The passes of MoMo on Muon over lists of matrices on an accelerator: directions first, and then the passes of the other
sets, to which a direction is given.
"""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from momo_hf.optim.kernels import launch
from momo_hf.optim.kernels.multi_tensor import (
    MultiTensor,
    MultiTensorAveraged,
    MultiTensorModelled,
    MultiTensorRamp,
)
from momo_hf.optim.muon import TINY, five_steps, length, product_dtype


class Muons(MultiTensor):
    """Base of the sets for Muon. The directions of all matrices lie in one tensor, stack after stack, in the dtype of the
    products; where in it stands in the tables, and not its address, which a CUDA graph would not find in them.
    """

    @cached_property
    def starts(self) -> list[int]:
        """Where the directions of every stack begin, at multiples of 16, and where the last ones end."""
        return [0, *accumulate(piece.numel + -piece.numel % 16 for piece in self.pieces)]

    @cached_property
    def all_directions(self) -> Tensor:
        weight = self.now.weight
        return weight.new_empty(self.starts[-1], dtype=product_dtype(weight))

    def column(self, role: str) -> tuple[int, ...]:
        if role != "exp_avg_sq":
            return super().column(role)
        begins: dict[Tensor, int] = {}
        for start, piece in zip(self.starts, self.pieces):
            begins |= {p: start + i * p.numel() for i, p in enumerate(piece.roles["param"])}
        return tuple(begins.get(p, 0) for p in self.bucket.roles["param"])

    @cached_property
    def samples(self) -> Tensor:
        """`Muon.sample` for every matrix; `first` makes it together with X_0."""
        return self.now.weight.new_empty(len(self.tables.places))

    def first(self) -> Tensor:
        from momo_hf.optim.kernels import triton_muon

        weight, places = self.now.weight, self.tables.places
        grad = {"grad_dtype": self.types["grad_dtype"]}
        sums, norms = self.over_blocks(triton_muon.sizes, 3, weight, **grad), torch.empty_like(self.samples)
        given = (places, sums, norms, self.samples, self.now.step)
        launch.launch(triton_muon.norms, len(places), *given, **self.momentum, tiny=TINY, block=self.block)
        self.over_blocks(triton_muon.scaled, 0, weight, norms, **grad)
        for start, piece in zip(self.starts, self.pieces):
            matrices = piece.roles["param"]
            shape = (len(matrices), len(matrices[0]), -1)
            stack = self.all_directions.narrow(0, start, piece.numel).view(shape)
            five_steps(stack, length(stack))
        return super().first()


class MuonModelled(Muons, MultiTensorModelled):
    """The paper's step."""


class MuonAveraged(Muons, MultiTensorAveraged):
    """The step that averages."""


class MuonRamp(Muons, MultiTensorRamp):
    """A step of the search."""

    def first(self) -> Tensor:
        slope, norm, _ = super().first().unbind()
        return torch.stack([slope, norm, self.samples.sum()])
