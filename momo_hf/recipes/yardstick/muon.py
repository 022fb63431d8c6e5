"""torch's Muon for hidden matrices and AdamW for all else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from momo_hf import muon_groups


def hidden_matrices_apart(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of `muon_groups`, but with convolutions in AdamW's, because torch's Muon does not take them."""
    members: dict[str, list[nn.Parameter]] = {"muon": [], "adam": []}
    for group in muon_groups(model):
        for p in group["params"]:
            members[group["method"] if p.ndim == 2 else "adam"].append(p)
    return [{"params": params, "method": method} for method, params in members.items() if params]


class InFloat32(TorchFunctionMode):
    """Within it torch's Muon does not go to bfloat16, in which a CPU without such units multiplies nine times slower."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class MuonAndAdamW(Optimizer):
    """Muon with steps of the size of AdamW's, so that one learning rate serves both; no weight decay.

    It is torch's, with matrices multiplied in float32.

    Args:
        params: groups from `hidden_matrices_apart`.
        lr: of both.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self._parts: list[Optimizer] = []
        for method, make in (("muon", _muon), ("adam", _adam)):
            groups = [group for group in self.param_groups if group["method"] == method]
            if groups:  # the same dicts, so that a schedule is seen by both
                self._parts.append(make(groups))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # it refuses a closure
        """Take one step of each; a closure is refused."""
        if closure is not None:
            raise ValueError("step() takes no closure here.")
        with InFloat32():
            for part in self._parts:
                part.step()


def _muon(groups: list[dict[str, Any]]) -> Optimizer:
    return Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _adam(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW(groups, weight_decay=0.0)
