"""What a saved state holds beyond torch's, and how it is taken back."""

from collections.abc import Iterable, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.model import ModelState
from momo_hf.optim.ramp import ORIGIN


# What a parameter's state may have: "start" where it joined late, the others by averaging and search.
OPTIONAL = ("start", "y", "exp_avg", ORIGIN)


def with_starts(state_dict: dict[str, Any], step: Tensor) -> dict[str, Any]:
    """A state with the number of steps before the first gradient for every parameter, not for late ones alone.

    So torch.distributed.checkpoint, which fills a fresh optimizer's state, finds room for it there.

    Args:
        state_dict: as `Optimizer.state_dict()` made it.
        step: k, for dtype and device.
    """
    for key, entry in state_dict["state"].items():
        start = entry.get("start", torch.zeros_like(step)).clone()
        state_dict["state"][key] = {**entry, "start": start}
    return state_dict


def take_back(
    state: MutableMapping[Tensor, dict[str, Tensor]],
    params: list[Tensor],
    state_dict: dict[str, Any],
    step: Tensor,
) -> None:
    """Mend a state that torch has loaded: buffers in float32 where it would cast them, and one start for all alike.

    Args:
        state: the state of the optimizer.
        params: its parameters, in the order of the groups.
        state_dict: what was loaded.
        step: k, for dtype and device.
    """
    starts: dict[float, Tensor] = {}
    for key, p in zip(chain.from_iterable(group["params"] for group in state_dict["param_groups"]), params):
        if key not in state_dict["state"]:
            continue
        saved = state_dict["state"][key]
        if p.dtype in (torch.float16, torch.bfloat16):
            # What was left out of the state has no use here.
            for name in state[p].keys() - {"start"}:
                state[p][name] = saved[name].to(device=p.device, dtype=torch.float32, copy=True)
        state[p].pop("start", None)
        start = float(saved.get("start", 0.0))
        if start:
            state[p]["start"] = starts.setdefault(start, torch.full_like(step, start))


def with_defaults(
    name: str, state_dict: dict[str, Any], defaults: dict[str, Any], buffers: Iterable[str]
) -> dict[str, Any]:
    """A saved state in which options and scalars that did not exist when it was saved have their defaults.

    Args:
        name: the class that is to load it.
        state_dict: as `Optimizer.state_dict()` made it.
        defaults: the options of the class.
        buffers: what every parameter's state must have; what is in `OPTIONAL` may be there too, and nothing else.

    Raises:
        ValueError: another method saved it, or this one with or without averaging, as it is not here.
    """
    averaged = {bool(group.get("averaging", False)) for group in state_dict["param_groups"]}
    if averaged != {bool(defaults["averaging"])}:
        raise ValueError(
            f"This state was saved with averaging={not defaults['averaging']}, and this {name} has "
            f"averaging={defaults['averaging']}: build it as the one that was saved."
        )
    needed = ["step", "loss_avg", "drift", "fstar", "lr", "beta" if "beta" in defaults else "betas"]
    missing = [key for key in needed if any(key not in group for group in state_dict["param_groups"])]
    if missing:
        raise ValueError(
            f"This state was not saved by {name}: its groups lack {missing}. Start from the weights alone, or load it "
            "into the optimizer that saved it."
        )
    expected = set(buffers)
    for entry in state_dict["state"].values():
        if not expected <= set(entry) <= expected | set(OPTIONAL):
            raise ValueError(
                f"This state was not saved by {name}: a parameter has {sorted(entry)}, expected {sorted(expected)}. "
                "Load it into the optimizer that saved it."
            )
    groups = []
    for group in state_dict["param_groups"]:
        zeros = {key: torch.zeros_like(group["step"]) for key in (*ModelState._fields, "effective_lr")}
        groups.append({**defaults, **zeros, **group})
    return {**state_dict, "param_groups": groups}
