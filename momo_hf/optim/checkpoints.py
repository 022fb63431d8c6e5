"""What a saved state holds beyond torch's, and how it is taken back."""

from collections.abc import Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.auto import STAND_IN
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group
from momo_hf.optim.steps.averaged import AVERAGES
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import LAST, ORIGIN, SEARCH, check_origins, with_origins
from momo_hf.optim.tensors.buckets import method_of


# What the groups hold beside their options.
SCALARS = (*MODEL.keys, *AVERAGES.keys, *SEARCH.keys, "effective_lr", "lr_max", STAND_IN, "train_mode", "left")
# What a parameter's state may have: "start" where it joined late, the others by averaging and search; "z" is of versions
# before z - y.
OPTIONAL = ("start", "y", "z", "ahead", "exp_avg", ORIGIN, LAST)


def completed(
    state_dict: dict[str, Any], state: Mapping[Tensor, Any], carried: dict[str, Tensor], averages: bool
) -> dict[str, Any]:
    """A state with everything that a fresh optimizer needs room for.

    torch.distributed.checkpoint fills the state of one, which does not know which parameters joined late, and whether a
    search is over.

    Args:
        state_dict: as `Optimizer.state_dict()` made it.
        state: of the optimizer, whose parameters are in the order of the saved ones.
        carried: what the groups have in a copy.
        averages: whether the iterates are averaged.
    """
    groups = [group | carried for group in state_dict["param_groups"]]
    entries = {}
    for key, entry in state_dict["state"].items():
        start = entry.get("start", torch.zeros_like(carried["drift"])).clone()
        entries[key] = {**entry, "start": start}
    made = {**state_dict, "state": entries, "param_groups": groups}
    return with_origins(made, state, averages) if SEARCH.stands_in(groups[0]) else made


def restore(groups: list[Group], state: MutableMapping[Tensor, dict[str, Tensor]], state_dict: dict[str, Any]) -> None:
    """Mend a state that torch has loaded: buffers in float32 where it would cast them, and one start for all alike.

    Args:
        groups: the parameter groups of the optimizer.
        state: its state.
        state_dict: what was loaded.
    """
    step = groups[0]["step"]
    starts: dict[float, Tensor] = {}
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for key, p in zip(keys, params):
        if key not in state_dict["state"]:
            continue
        saved = state_dict["state"][key]
        if p.dtype in (torch.float16, torch.bfloat16):
            # What was left out of the state has no use here.
            for name in state[p].keys() - {"start"}:
                value = saved[name] if name in saved else saved["z" if name == ORIGIN else "exp_avg"]
                state[p][name] = value.to(device=p.device, dtype=torch.float32, copy=True)
        state[p].pop("start", None)
        start = float(saved.get("start", 0.0))
        if start:
            state[p]["start"] = starts.setdefault(start, torch.full_like(step, start))


def with_defaults(
    name: str, state_dict: dict[str, Any], defaults: dict[str, Any], methods: Mapping[str, Method]
) -> dict[str, Any]:
    """A saved state in which options and scalars that did not exist when it was saved have their defaults.

    Args:
        name: the class that is to load it.
        state_dict: as `Optimizer.state_dict()` made it.
        defaults: the options of the class.
        methods: of the class.

    Raises:
        ValueError: another method saved it, or this one with or without averaging, as it is not here; or it is from the
            middle of a search and lacks the weights from before it.
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
    groups = []
    for group in state_dict["param_groups"]:
        if group.get("method", next(iter(methods))) not in methods:
            raise ValueError(
                f"This state was not saved by {name}: it has parameters of the method {group['method']!r}, and {name} knows "
                f"{', '.join(map(repr, methods))}. Load it into the optimizer that saved it."
            )
        expected = set(method_of(group, methods).buffers)
        own = {"ahead", "z", ORIGIN} if defaults["averaging"] else {"exp_avg"}
        for entry in (state_dict["state"][key] for key in group["params"] if key in state_dict["state"]):
            found = set(entry)
            if not (expected <= found <= expected | set(OPTIONAL) and own & found):
                raise ValueError(
                    f"This state was not saved by {name}: a parameter has {sorted(found)}, expected "
                    f"{sorted(expected | own)}. Load it into the optimizer that saved it."
                )
        zeros = {key: torch.zeros_like(group["step"]) for key in (*MODEL.keys, "effective_lr")}
        groups.append({**defaults, **zeros, **group})
    check_origins(state_dict)
    return {**state_dict, "param_groups": groups}
