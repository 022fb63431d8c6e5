"""What something else did to parameters whose iterates are averaged, and what it means for z and x.

Whatever writes to a parameter in place raises its version, which is compared before every step and every change of modes
(what torch does not see stands in `movement`). What was written is then taken for one of two things:

* in eval mode, where the parameters hold x, for weights to begin at: best weights that were loaded, first weights that were
  put back for the next fold. z and y become what is there, and where that is most of the model the average begins anew. A
  fingerprint of every parameter tells them from weights that were moved or swapped, and put back.
* in train mode, where they hold y, for a change of y, which z and x take too: the same is added to all three, and what was set
  to 0, as masks do, is 0 in all three. Clamps, projections and averages over workers hold for y alone, and that is said.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from momo_hf.optim.record import Group, params_of
from momo_hf.optim.steps.movement import Marks, marks
from momo_hf.optim.steps.ramp import ORIGIN
from momo_hf.optim.tensors.sharding import Layout, layout_of, local


logger = logging.getLogger(__name__)

State = Mapping[Tensor, dict[str, Tensor]]
Print = tuple[Tensor, Tensor, torch.dtype]

# Two fingerprints are of the same values where they differ by less than this share: sums depend on the number of threads.
SAME = 1e-9
# How many changes in train mode are looked at, which reads the device, before only every so many of them are.
LOOKS, EVERY = 10, 50

SAID = (
    "Something other than this optimizer wrote to parameters between two steps (the first one is {name}). What was set to 0 is 0 in the "
    "averaged weights too; any other change is added to them, so that clamps, projections and averages over workers hold where "
    "gradients are taken, but not for the averaged weights: repeat them on a copy that you evaluate or save, or leave averaging out. "
    "Weights that training is to begin at: load them after optimizer.eval()."
)


class Outside:
    """Follows the parameters from one step or change of modes to the next."""

    def __init__(self) -> None:
        self._marks: Marks = []
        self._prints: dict[Tensor, Print] = {}  # of all in eval mode, and in train mode of those that are watched
        self._watched: dict[Tensor, None] = {}
        self._zeros: dict[Tensor, Tensor] = {}  # how many values of those are 0
        self._begun: dict[Layout | None, Tensor] = {}  # the number of elements that began anew since the last step
        self._looks = 0
        self._said = False

    def forget(self) -> None:
        """Take the parameters for what they are, whatever is done to them until they are left the next time."""
        self._marks = []

    def leave(self, groups: list[Group], state: State, trains: bool) -> None:
        """Remember how the optimizer leaves the parameters.

        Args:
            groups: parameter groups.
            state: of their parameters.
            trains: whether they hold y.
        """
        params = params_of(groups)
        self._marks = marks(params)
        self._prints = fingerprints(list(self._watched) if trains else [p for p in params if p in state])
        self._zeros = {p: zeros_of(p) for p in self._watched if trains}

    def follow(self, groups: list[Group], state: State, trains: bool) -> None:
        """Have z and x follow what was done to the parameters since.

        Args:
            groups: parameter groups.
            state: of their parameters; it is changed.
            trains: whether the parameters hold y.
        """
        params, before = params_of(groups), self._marks
        now = marks(params)
        if now[: len(before)] == before:
            return
        # What follows those that are known has joined since.
        changed = {p: new[:-1] != old[:-1] for p, new, old in zip(params, now, before) if new != old and p in state}
        for p in changed:
            if trains:
                _shift(p, state[p])
            else:
                self._begin(p, state[p])
        if trains and not self._said:
            self._look(groups, changed, all(changed.get(p, False) for p in params[: len(before)] if p in state))
        self._marks = now

    # ---- In eval mode ----

    def _begin(self, p: Tensor, entry: dict[str, Tensor]) -> None:
        """x, y and z become what is in the parameter, unless its values are what they were."""
        if p not in self._prints or p.dtype != self._prints[p][2]:  # in another dtype values round, and mean the same
            return
        new, values = self._differs(p), local(p)
        if "ahead" in entry:
            local(entry["ahead"]).masked_fill_(new, 0.0)
        for name in entry.keys() & {"y", ORIGIN}:
            held = local(entry[name])
            held.copy_(torch.where(new, values.to(held.dtype), held))
        layout = layout_of(p)
        self._begun[layout] = self._begun.get(layout, 0.0) + new * values.numel()

    @property
    def begins(self) -> bool:
        """Whether parameters may have begun anew since the last step."""
        return bool(self._begun)

    def begun(self, layouts: Iterable[Layout | None], like: Tensor) -> dict[Layout | None, Tensor]:
        """How many elements of this process have begun anew since the last step, for every layout a scalar like `like`."""
        none = torch.zeros_like(like)
        return {layout: self._begun.get(layout, none).to(like) for layout in layouts}

    def after_step(self) -> None:
        """What began anew has been heard of."""
        self._begun = {}

    # ---- In train mode ----

    def _look(self, groups: list[Group], changed: Mapping[Tensor, bool], whole: bool) -> None:
        """Say once that there are changes that the averaged weights do not follow, as soon as they are seen.

        Of the first change of a parameter nobody knows what was there before; unless all were written to it is followed by
        a second look.
        """
        self._looks += 1
        # Where more values are 0 than before, a mask was there.
        known = ((p, zeros) for p, zeros in self._zeros.items() if p in changed)
        strays = (p for p, zeros in known if self._differs(p) & (zeros_of(p) <= zeros))
        first = next(iter(changed if whole else strays), None)
        looks_again = first is None and (self._looks < LOOKS or self._looks % EVERY == 0)
        self._watched = {**self._watched, **dict.fromkeys(changed)} if looks_again else {}
        if first is not None:
            self._said = True
            if not (dist.is_initialized() and dist.get_rank() > 0):
                logger.warning(SAID.format(name=name_of(first, groups)))

    def _differs(self, p: Tensor) -> Tensor:
        """Whether the values of a parameter are others than when it was left, 0-dim bool."""
        (now,), before = fingerprints([p]).values(), self._prints[p]
        apart = [(n - b.to(n.device)).abs() > SAME * n for n, b in zip(now[:2], before[:2])]
        return apart[0] | apart[1]


def _shift(p: Tensor, entry: dict[str, Tensor]) -> None:
    """Add to z and x what was added to y; as what is stored is the difference, that is nothing but for the zeros."""
    values, ahead = local(p), local(entry["ahead"])
    if "y" in entry:
        y = local(entry["y"])
        new = values != y.to(values.dtype)
        y.copy_(torch.where(new, values.to(y.dtype), y))
    ahead.masked_fill_(values == 0, 0.0)


# ---- Parameters ----


def fingerprints(params: list[Tensor]) -> dict[Tensor, Print]:
    """Two norms of the part of every parameter that this process holds, in a few calls for all of them, and its dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        alike.setdefault((p.device, p.dtype), []).append(p)
    found: dict[Tensor, Print] = {}
    for (device, dtype), some in alike.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        parts = [local(p).detach() for p in some]
        ones, twos = (torch._foreach_norm(parts, order, dtype=wide) for order in (1, 2))
        found |= {p: (one, two, dtype) for p, one, two in zip(some, ones, twos)}
    return found


def zeros_of(p: Tensor) -> Tensor:
    """How many values of the part that this process holds are 0."""
    return (local(p) == 0).sum()


def name_of(p: Tensor, groups: list[Group]) -> str:
    """What to call a parameter: its name where the optimizer was given names, and its place in the groups otherwise."""
    for index, group in enumerate(groups):
        for place, other in enumerate(group["params"]):
            if other is p:
                names = group.get("param_names")
                known = names[place] if names else f"number {place} of group {index}"
                return f"{known}, shape {tuple(p.shape)}"
    raise ValueError("The parameter is in none of the groups.")
