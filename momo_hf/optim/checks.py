"""What can be wrong with the arguments of an optimizer or a loss, and the words for it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from momo_hf.optim.method import Method
from momo_hf.optim.record import SHARED_OPTIONS
from momo_hf.optim.steps.averaged import check_averaging
from momo_hf.optim.tensors.sharding import is_dtensor


NO_LOSS = (
    "{name}.step() needs the loss of this step, and got none. Give it in one of three ways: step(loss=loss) after "
    "loss.backward(); step(closure) with a closure that returns the loss; or set_loss(loss) before step(). With "
    "accelerate and transformers, `import momo_hf` does it: call backward(loss) of the Accelerator that prepared this "
    "optimizer, once at least for every step; the loss goes when its gradients are zeroed or replaced by other tensors. "
    "Without accelerate, several processes have to average it first."
)


def check_range(name: str, value: float, low: float, high: float, interval: str) -> None:
    """Raise a ValueError that names the argument, its value and the interval unless `low <= value < high`."""
    if not low <= value < high:
        raise ValueError(f"`{name}` must be in {interval}, got {value}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a ValueError that names the argument, its value and the choices unless it is one of them."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_group(group: dict[str, Any], methods: Mapping[str, Method]) -> None:
    """Raise a ValueError for an option of a parameter group that every method has and that is out of its range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"`lr` must hold one number, got a tensor of shape {tuple(lr.shape)}.")
    check_range("lr", float(lr), 0.0, math.inf, "[0, inf)")
    check_range("weight_decay", group["weight_decay"], 0.0, math.inf, "[0, inf)")
    if "beta" in group:
        check_range("beta", group["beta"], 0.0, 1.0, "[0, 1)")
    else:
        check_range("betas[0]", group["betas"][0], 0.0, 1.0, "[0, 1)")
    if not math.isfinite(group["lb"]):
        raise ValueError(f"`lb` must be a finite number, got {group['lb']}: give one that the loss never falls below.")
    check_choice("use_fstar", group["use_fstar"], (False, True))
    if "method" in group:
        check_choice("method", group["method"], tuple(methods))
    check_averaging(group)
    count = len(group["params"])
    for name in ("tables", "embeddings"):
        places = group.get(name, ())
        if not (isinstance(places, Sequence) and all(type(place) is int and 0 <= place < count for place in places)):
            raise ValueError(
                f"`{name}` must be the places of embeddings among the {count} parameters of their group, from 0 to "
                f"{count - 1}, got {places!r}: momo_hf.mark_tables(model, optimizer) finds them."
            )


def check_plain(params: Mapping[str, Tensor]) -> None:
    """Raise a ValueError, by its name, for a parameter that is to be trained and packs its elements, as a quantized weight does."""
    for name, p in params.items():
        if p.requires_grad and is_traceable_wrapper_subclass(p) and not is_dtensor(p):
            raise ValueError(
                f"{name} is to be trained and is a {type(p).__name__}, which packs its elements: freeze it by requires_grad_(False) "
                "and train adapters such as LoRA, or build it in float32 or bfloat16."
            )


def check_one_model(group: dict[str, Any], head: dict[str, Any]) -> None:
    """Raise a ValueError if a group describes another model of the loss than the first one."""
    for name in SHARED_OPTIONS:
        if group.get(name) != head.get(name):
            raise ValueError(
                f"`{name}` must be the same in all parameter groups, got {head.get(name)} and {group.get(name)}: there "
                "is one model of the loss. Groups may differ in `lr` and `weight_decay`."
            )


def check_loss(loss: Tensor | float, param_groups: list[dict[str, Any]]) -> None:
    """Raise a ValueError if a loss is not one number, or is on a device that holds no parameter."""
    if not isinstance(loss, Tensor):
        return
    if loss.numel() != 1:
        raise ValueError(
            f"`loss` must hold one element, got shape {tuple(loss.shape)}: reduce it as it was for backward(), for "
            "example with loss.mean()."
        )
    if not any(p.device == loss.device for group in param_groups for p in group["params"]):
        names = ", ".join(sorted({str(p.device) for group in param_groups for p in group["params"]}))
        raise ValueError(
            f"`loss` is on {loss.device}, but the parameters are on {names}: pass loss.to(device) with one of these."
        )
