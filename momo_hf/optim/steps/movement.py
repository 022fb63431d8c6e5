"""What the parameters did, where it is not what the step asked for.

The model needs <d_k, x_{k+1} - x_k>. The step size gives it in closed form, without a read of the parameters, as long as
they do what the step says. Two things come between:

* a parameter in bfloat16 or float16 rounds, and most of a small step may round away. The second pass, which has the
  value before and after rounding at hand, returns <d_k, what was lost>;
* something else changes parameters between two steps: projections, masks, restored rows, averages over workers, loaded
  weights. That raises the version of a tensor or moves it to other memory, which is compared at every step. Then the
  parameters are read once for <d_k, x>, and the difference to what the second pass left is what happened.

Torch does not see `p.data.copy_()` (as in diffusers' `EMAModel.copy_to`; harmless where `restore` follows), writes through NumPy
or another view that has no part in the tensor's version, and `torch._foreach_` functions on DTensors.

Both are parts of sums over shards, so they wait for the one reduction of the next step.

<d_k, x> can be compared with what it was only where the momentum is what it was: where something else wrote to it, or took it
away, the model keeps its height and forgets the slope. A saved state, a pickle and a copy carry <d_k, x> along, so that weights
that change before their first step are followed too (not where parameters are spread over processes).
"""

from collections.abc import Iterable, Mapping
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.steps.elementwise import inner_product
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.sharding import Layout, has_dtensors, is_dtensor, local, sum_over_shards


Marks = list[tuple[int, ...]]
VERSION, PLACE = attrgetter("_version"), methodcaller("data_ptr")


class Movement:
    """Follows the parameters from the end of a step to the beginning of the next one; all sums are local parts."""

    def __init__(self) -> None:
        self._left: dict[Layout | None, Tensor] = {}  # <d_k, x_{k+1}> as the step left it
        self._lost: dict[Layout | None, Tensor] = {}  # <d_k, rounding> that is in no drift yet
        self._marks: Marks = []
        self._momenta: list[Tensor] = []  # of the step under way
        self._kept: dict[int, int] = {}  # the version of every momentum, by its place in memory

    def since_last_step(
        self, params: list[Tensor], buckets: list[Bucket], layouts: Iterable[Layout | None], like: Tensor
    ) -> dict[Layout | None, Tensor]:
        """<d_k, x> of now minus what the model believes, before momentum and parameters change; for every layout.

        Args:
            params: all parameters, in the order of the groups.
            buckets: of the coming step.
            layouts: every layout, in the same order on all processes.
            like: a scalar with dtype and device of the result.
        """
        strayed = {layout: self._lost.get(layout, torch.zeros_like(like)) for layout in layouts}
        self._momenta = [momentum for bucket in buckets for momentum in bucket.roles["exp_avg"]]
        if self._left and self._has_changed(params) and self._keeps(self._momenta):
            for layout, value in self._left.items():
                strayed[layout] = strayed[layout] - value
            for bucket in buckets:
                strayed[bucket.layout] = strayed[bucket.layout] + overlap(bucket).to(like)
        return strayed

    def after_step(
        self, params: list[Tensor], found: dict[Layout | None, Tensor], rounds: Mapping[Layout | None, bool]
    ) -> Tensor | None:
        """Remember how the second pass left the parameters.

        Args:
            params: as above.
            found: <d, x> and <d, rounding> of the second pass for every layout.
            rounds: whether a layout has parameters that round.

        Returns:
            What the drift of the model has to take in at once, because no other process has a part in it; or None.
        """
        pairs = {layout: sums.unbind() for layout, sums in found.items()}
        self._left = {layout: left for layout, (left, _) in pairs.items()}
        self._lost = {layout: lost for layout, (_, lost) in pairs.items() if rounds[layout]}
        self._remember(params, self._momenta)
        self._momenta = []
        return self._lost.pop(None, None)

    def unsettled(self) -> Tensor | None:
        """<d_k, rounding> over all shards, if the drift has not taken it in yet; a collective on all processes."""
        totals = [sum_over_shards(value, layout) for layout, value in self._lost.items()]
        return sum(totals[1:], totals[0]) if totals else None

    def at_rest(self, params: list[Tensor], state: Mapping[Tensor, Any]) -> tuple[Tensor | None, Tensor | None]:
        """What a copy of the optimizer needs.

        Args:
            params: all parameters, in the order of the groups.
            state: per parameter.

        Returns:
            <d, x> of now minus what the model believes, and <d, x>; None for what nobody knows.
        """
        if self._left.keys() != {None}:
            return None, None
        momenta, left = momenta_of(params, state), self._left[None]
        same = self._keeps(momenta)
        if same and not self._has_changed(params):
            return None, left
        pairs = ((state[p]["exp_avg"], p.detach()) for p in params if p in state)
        now = sum(((d * p).sum().to(left) for d, p in pairs), torch.zeros_like(left))
        return (now - left if same else None), now

    def take_up(self, params: list[Tensor], state: Mapping[Tensor, Any], left: Tensor | None) -> None:
        """Go on from <d, x> as `at_rest` gave it, with the parameters and the momentum as they are now."""
        self._left = {} if left is None else {None: left}
        self._remember(params, momenta_of(params, state))

    def _remember(self, params: list[Tensor], momenta: list[Tensor]) -> None:
        self._marks = marks(params)
        self._kept = versions(momenta)

    def _has_changed(self, params: list[Tensor]) -> bool:
        # Parameters of a group that was added since follow those that are known.
        return marks(params)[: len(self._marks)] != self._marks

    def _keeps(self, momenta: list[Tensor]) -> bool:
        """Whether the momentum is what it was; that of parameters which joined since is 0."""
        return self._kept.items() <= versions(momenta).items()


def momenta_of(params: list[Tensor], state: Mapping[Tensor, Any]) -> list[Tensor]:
    """The momentum of every parameter that has one."""
    return [local(state[p]["exp_avg"]) for p in params if "exp_avg" in state.get(p, ())]


def overlap(bucket: Bucket) -> Tensor:
    """<d, x> of this process's part with momentum and parameters as they are, 0-dim."""
    sums = [inner_product(piece.read("exp_avg"), piece.read("param")) for piece in bucket.pieces()]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=bucket.dtype, device=bucket.device)


def versions(tensors: list[Tensor]) -> dict[int, int]:
    """The version of every tensor that has elements, by its place in memory."""
    found = dict(zip(map(PLACE, tensors), map(VERSION, tensors)))
    found.pop(0, None)
    return found


def marks(params: list[Tensor]) -> Marks:
    """What changes when a tensor is written in place or put elsewhere, without a look at its values."""
    if not has_dtensors(params):
        return list(zip(map(VERSION, params), map(PLACE, params)))
    # Operations on a DTensor raise its own version, those on its part the version of the part.
    parts = [p._local_tensor if is_dtensor(p) else p for p in params]
    return [(p._version, part._version, part.data_ptr()) for p, part in zip(params, parts)]
