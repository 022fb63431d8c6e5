"""`lr="auto"`: what stands in a group's `lr` until the cap is found, and what becomes of it, in groups and schedules.

Until then `lr` is a stand-in, the default of the optimizer's class, which schedules multiply as they would any number. When the
search is over, `lr` becomes the rate itself, once: `lr` and `initial_lr` of the groups, and what schedules took their copies of
from there (`base_lrs`), are multiplied by cap / stand-in. From then on whatever reads or writes a learning rate (logs,
schedules with a floor, loops that set `group["lr"]`) means what it means for AdamW. A schedule knows its optimizer, and not the
other way round, so torch's base class notes every schedule that is made, without holding it.
"""

import functools
import inspect
import logging
import math
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from momo_hf.optim.record import Group
from momo_hf.optim.steps.ramp import SEARCH
from momo_hf.optim.steps.search import AUTO
from momo_hf.optim.steps.verdict import Verdict, tell_start


logger = logging.getLogger(__name__)

# In a group: the stand-in, as long as `lr` counts in it; 0 where `lr` is a rate.
STAND_IN = "lr_stand_in"
# Where the class of an optimizer has no number as its default.
OTHERWISE = 1e-2
# torch's schedules that are given rates, and write them over what was there.
WITH_RATES = (CyclicLR, OneCycleLR)
TO_CHANGE = 'For the new one set group["lr"] after loading, and `base_lrs` of a schedule.'
LARGEST = ' With averaging set group["lr_max"] too, because the largest so far counts.'

_schedules: WeakSet[LRScheduler] = WeakSet()


@functools.cache
def note_schedules() -> None:
    """Have torch's schedules noted; at the first optimizer, because importing this is to have no effect on others."""
    original = LRScheduler.__init__

    @functools.wraps(original)
    def init(self: LRScheduler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _schedules.add(self)
        stand_ins = [group for group in self.optimizer.param_groups if group.get(STAND_IN)]
        if stand_ins and isinstance(self, WITH_RATES):
            for group in stand_ins:
                group[STAND_IN] = 0.0
            logger.warning(
                f'{type(self).__name__} gives learning rates of its own, so they count, and lr="{AUTO}" does not: none is '
                f"searched for. Take another schedule, or none, to have one found; or give `lr` a number."
            )

    LRScheduler.__init__ = init  # type: ignore[method-assign]


def stand_in_of(cls: type) -> float:
    """What stands in `lr` of an optimizer's groups until a cap is found."""
    lr = inspect.signature(cls).parameters.get("lr")
    default = None if lr is None else lr.default
    return float(default) if isinstance(default, int | float) and default > 0 else OTHERWISE


def join_search(group: Group, head: Group | None, stand_in: float) -> bool:
    """Turn `lr="auto"` of a group that is being added into what it stands for.

    Args:
        group: it is changed.
        head: the first group, or None if it is this one.
        stand_in: of the class.

    Returns:
        Whether the cap is found by a search.

    Raises:
        ValueError: `lr` is another text, or some groups have a number and some have not.
    """
    lr, auto = group["lr"], SEARCH.stands_in(head or {})
    if isinstance(lr, str) and lr != AUTO:
        raise ValueError(f'`lr` must be a number or "{AUTO}", got {lr!r}.')
    found = head is not None and auto and not head.get(STAND_IN)
    if head is None:
        auto = isinstance(lr, str)
    elif isinstance(lr, str) != auto and not found:
        raise ValueError(
            f'`lr` must be "{AUTO}" in all parameter groups or in none, got it and {"a number" if auto else lr}: '
            f'the search finds one cap for all. Give "{AUTO}" to all, and then the groups their shares of it: '
            'group["lr"] *= 0.5.'
        )
    if isinstance(lr, str):
        group["lr"] = float(head["search_cap"]) if head is not None and found else stand_in
    if auto:
        group[STAND_IN] = 0.0 if found else stand_in
    return auto


def begins(groups: list[Group]) -> bool:
    """Begin the search before its first step, or leave it out where a schedule has given rates meanwhile, see `WITH_RATES`.

    Args:
        groups: the parameter groups; without a search they are then those of an optimizer whose `lr` was given.

    Returns:
        Whether there is a search.
    """
    searches = any(group[STAND_IN] for group in groups)
    if searches:
        tell_start()
    for group in groups if not searches else ():
        for key in (*SEARCH.keys, STAND_IN):
            del group[key]
    return searches


def take_cap(groups: list[Group], verdict: Verdict | None) -> None:
    """Make rates of what counts in a stand-in, once.

    Args:
        groups: the parameter groups, after the search.
        verdict: of its last step, or None where the cap is to be read from the device, as after a load.
    """
    if not groups[0].get(STAND_IN):
        return
    cap = float(groups[0]["search_cap"]) if verdict is None else verdict.cap
    before = base_rates(groups)
    for group in groups:
        if stand_in := group[STAND_IN]:
            _multiply(group, stand_in, cap)
            group[STAND_IN] = 0.0
    led = lead_schedules(groups, before)
    if not led and verdict is not None and any("initial_lr" in group for group in groups):
        logger.warning(
            f"A schedule that is none of torch's, or a copy of one, began with lr={before[0]:g}, which only stood in for the "
            f"cap that was found, {cap:.3g}. If it goes on, make it anew from here."
        )


def drop_cap(groups: list[Group], stand_in: float) -> None:
    """Take back what `take_cap` did, where a new search is to begin.

    Args:
        groups: the parameter groups, with or without a search that is over.
        stand_in: of the class.
    """
    head = groups[0]
    if not SEARCH.stands_in(head) or head[STAND_IN] or not (cap := float(head["search_cap"])):
        return
    before = base_rates(groups)
    for group in groups:
        _multiply(group, cap, stand_in)
        group[STAND_IN] = stand_in
    lead_schedules(groups, before)


def _multiply(group: Group, by: float, times: float) -> None:
    for name in {"lr", "initial_lr", "lr_max"} & group.keys():
        if isinstance(group[name], Tensor):
            group[name].mul_(times / by)
        else:
            group[name] = group[name] / by * times


def lead_schedules(groups: list[Group], before: list[float]) -> bool:
    """Give schedules the base rates that their groups have now, where they still have those from before.

    Args:
        groups: the parameter groups, as the optimizer has them.
        before: `base_rates` that stand-ins were counted in.

    Returns:
        Whether there are any.
    """
    now = base_rates(groups)
    ours = [s for s in list(_schedules) if getattr(s.optimizer, "param_groups", None) is groups]
    for schedule in ours:
        bases = list(schedule.base_lrs)
        for i, (base, old, new) in enumerate(zip(bases, before, now)):
            if math.isclose(float(base), old, rel_tol=1e-6):
                bases[i] = base.new_full(base.shape, new) if isinstance(base, Tensor) else new
        schedule.base_lrs = bases
    return bool(ours)


def base_rates(groups: list[Group]) -> list[float]:
    """The learning rates of groups before any schedule."""
    return [float(group["initial_lr" if "initial_lr" in group else "lr"]) for group in groups]


def caps_before_schedules(groups: list[Group]) -> list[float] | None:
    """The bounds of the step size before any schedule; None while they are searched for."""
    rates = base_rates(groups)
    if not SEARCH.stands_in(groups[0]):
        return rates
    cap = float(groups[0]["search_cap"])
    if not float(groups[0]["search_ended"]):
        return None
    return [rate / group[STAND_IN] * cap if group.get(STAND_IN) else rate for rate, group in zip(rates, groups)]


class Choice:
    """The learning rate that an optimizer was built with, before a state is loaded into it.

    Args:
        groups: the parameter groups, before.
        fresh: whether no step was taken yet.
    """

    def __init__(self, groups: list[Group], fresh: bool) -> None:
        self._fresh, self._rates = fresh, base_rates(groups)
        self._auto = any(bool(group.get(STAND_IN)) for group in groups)

    def meet(self, groups: list[Group]) -> None:
        """Let schedules follow the groups as they are after the load; where they have another rate, say that it counts."""
        if self._auto:
            lead_schedules(groups, self._rates)
        searched, rates = SEARCH.stands_in(groups[0]), base_rates(groups)
        alike = len(rates) == len(self._rates) and all(map(math.isclose, rates, self._rates))
        if not self._fresh or (searched if self._auto else alike and not searched):
            return
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        caps = caps_before_schedules(groups)
        found = "a search for it that goes on" if caps is None else _named(caps) + ", found by a search" * searched
        logger.warning(
            f"The learning rate of this optimizer is {AUTO if self._auto else _named(self._rates)}, and the loaded state brings "
            f"{found}: that counts, as with torch's optimizers, unless a schedule writes another one. "
            + ("To search anew, load the weights alone." if self._auto else TO_CHANGE)
            + (LARGEST if "lr_max" in groups[0] and not self._auto else "")
        )


def _named(rates: list[float]) -> str:
    return " and ".join(dict.fromkeys(f"{rate:.3g}" for rate in rates))
