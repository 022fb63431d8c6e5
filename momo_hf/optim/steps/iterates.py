"""The two points that averaging keeps for every parameter, z - y and y: made, exchanged for x, and taken over from a saved state."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from momo_hf.optim.method import Method
from momo_hf.optim.record import Group
from momo_hf.optim.tensors.buckets import method_of
from momo_hf.optim.tensors.chunks import pieces
from momo_hf.optim.tensors.sharding import local


def first_iterates(param: Tensor) -> dict[str, Tensor]:
    """z - y, and y where the parameter cannot hold it, of a parameter that gets its first gradient: all are one point."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    start = {"ahead": torch.zeros_like(param, dtype=dtype)}
    return start if dtype == param.dtype else start | {"y": param.detach().to(dtype, copy=True)}


def write_iterates(groups: list[Group], state: Mapping[Tensor, dict[str, Tensor]], train: bool) -> None:
    """Write y, or else x, into parameters that hold the other.

    In float64: then y follows from the rounded x again where the last digits of both weigh the same, and elsewhere a y
    that leads back to the same x. So nothing drifts, however often the modes change.

    Args:
        groups: parameter groups.
        state: of their parameters.
        train: whether they are to hold y.
    """
    together: dict[tuple, dict[str, list[Tensor]]] = {}
    for group in groups:
        for p in filter(state.__contains__, group["params"]):
            held = state[p].get("y", p)
            key = (p.device, p.dtype, held is p, group["averaging"])
            roles = together.setdefault(key, {"param": [], "held": [], "ahead": []})
            for role, tensor in zip(roles, (p, held, state[p]["ahead"])):
                roles[role].append(local(tensor))
    for (device, _, alone, interpolation), roles in together.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        for piece in pieces(roles, wide):
            held = piece.read("held")
            if alone or not train:
                held = held + (1 if train else -1) * (1 / interpolation - 1) * piece.read("ahead")
            piece.write("param", held)


def fit_iterates(
    groups: list[Group],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    methods: Mapping[str, Method],
    trains: bool,
    probed: bool,
) -> None:
    """Take over the iterates of a loaded state: of an earlier version, which had z in the place of z - y, or of parameters
    in another dtype, which have or have not a y of their own. The momentum of a method that keeps none is dropped, and begins
    at 0 where one is to be kept.

    Args:
        groups: parameter groups.
        state: of their parameters.
        methods: by the names that groups have as their `method`.
        trains: whether the parameters hold y.
        probed: whether the state was made for torch.distributed.checkpoint, perhaps before the weights were loaded, so
            that the average begins at the parameters as they are.
    """
    for group in groups:
        interpolation, keeps_momentum = group["averaging"], method_of(group, methods).keeps_momentum
        for p in filter(state.__contains__, group["params"]):
            entry, held = state[p], p.detach()
            if probed:
                entry.update(first_iterates(p))
            if "z" in entry:
                z = entry.pop("z")
                entry["ahead"] = z - entry["y"] if "y" in entry else (z - held) * (1 if trains else interpolation)
            if p.dtype.itemsize >= 4:
                entry.pop("y", None)
            elif "y" not in entry:
                y = held.to(entry["ahead"].dtype, copy=True)
                entry["y"] = y if trains else y.add_(entry["ahead"], alpha=1 / interpolation - 1)
            elif trains:  # what was written to the parameter since the state was saved counts
                y = entry["y"]
                entry["y"] = torch.where(held == y.to(p.dtype), y, held.to(y.dtype))
            if keeps_momentum:
                entry.setdefault("exp_avg", torch.zeros_like(entry["ahead"]))
            else:
                entry.pop("exp_avg", None)
