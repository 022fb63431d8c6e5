"""What a saved state holds beyond torch's, and how it is taken back."""

from collections.abc import Iterable, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.model import ModelState
from momo_hf.optim.ramp import ORIGIN


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
    names: Iterable[str],
    step: Tensor,
) -> None:
    """Mend a state that torch has loaded: buffers in float32 where it would cast them, and one start for all alike.

    Args:
        state: the state of the optimizer.
        params: its parameters, in the order of the groups.
        state_dict: what was loaded.
        names: the entries of the state that the method works on.
        step: k, for dtype and device.
    """
    starts: dict[float, Tensor] = {}
    for key, p in zip(chain.from_iterable(group["params"] for group in state_dict["param_groups"]), params):
        if key not in state_dict["state"]:
            continue
        saved = state_dict["state"][key]
        if p.dtype in (torch.float16, torch.bfloat16):
            for name in names:
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
        buffers: what every parameter's state must have; "start" and the origin of a search may be there too,
            and nothing else.

    Raises:
        ValueError: another method saved it.
    """
    needed = ["step", "loss_avg", "drift", "fstar", "lr", "beta" if "beta" in defaults else "betas"]
    missing = [key for key in needed if any(key not in group for group in state_dict["param_groups"])]
    if missing:
        raise ValueError(
            f"This state was not saved by {name}: its groups lack {missing}. Start from the weights alone, or load it "
            "into the optimizer that saved it."
        )
    expected = set(buffers)
    for entry in state_dict["state"].values():
        if set(entry) - {"start", ORIGIN} != expected:
            raise ValueError(
                f"This state was not saved by {name}: a parameter has {sorted(entry)}, expected {sorted(expected)}. "
                "Load it into the optimizer that saved it."
            )
    groups = []
    for group in state_dict["param_groups"]:
        zeros = {key: torch.zeros_like(group["step"]) for key in (*ModelState._fields, "effective_lr")}
        groups.append({**defaults, **zeros, "base_lr": float(group["lr"]), **group})
    return {**state_dict, "param_groups": groups}
