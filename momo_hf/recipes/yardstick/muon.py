"""torch's Muon for hidden matrices and AdamW for all else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode


NARROW = 16  # a matrix with a shorter side, such as one of LoRA, is AdamW's


def hidden_matrices_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with their `method`: "muon" for hidden matrices, "adam" for all else.

    All else is embeddings, the output layer (where a model does not name it, its last linear layer), narrow matrices,
    biases, norms and convolutions, which torch's Muon does not take.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    output = getattr(model, "get_output_embeddings", lambda: None)() or (layers[-1] if layers else None)
    apart = {module.weight for module in model.modules() if isinstance(module, nn.Embedding) or module is output}
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = {p for p in trained if p.ndim == 2 and min(p.shape) >= NARROW and p not in apart}
    groups = {"muon": [p for p in trained if p in hidden], "adam": [p for p in trained if p not in hidden]}
    return [{"params": params, "method": method} for method, params in groups.items() if params]


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
