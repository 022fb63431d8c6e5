"""The loss and the clip factor, from any Accelerator to the MoMo optimizer that it prepared.

`Accelerator.backward` is the one place that every loop passes: Trainer, the trainers of other packages and loops
written by hand, with DeepSpeed even the place where the step itself is taken. So that is where the loss is read.
An Accelerator without a MoMo optimizer behaves as before.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from momo_hf.integrations import deepspeed
from momo_hf.optim import MomoOptimizer


logger = logging.getLogger(__name__)

# Steps between two looks at the counters of the optimizer: a look is a read-back from the device.
CHECK_EVERY = 50


class LossWindow:
    """What was backpropagated since the optimizer's last step, and its mean over the data-parallel ranks.

    Micro-batches are summed here; with the last one of a window the reduction starts, before the backward pass, and
    the optimizer's step waits for it.
    """

    def __init__(self, optimizer: MomoOptimizer) -> None:
        self._local: Tensor | None = None
        self._reduced: list[tuple[Tensor, dist.Work | None]] = []
        self._clip_factor: Tensor | None = None
        self.zero: Any = None  # ZeRO's optimizer, which clips inside its step
        self._steps = 0
        self._skipped_seen = 0
        self._warned: set[str] = set()
        optimizer.register_step_pre_hook(self._before_step)

    def add(self, loss: Tensor, last: bool) -> None:
        """Take in the loss of one backward pass, divided as its gradient is; `last` ends the local sum."""
        if loss.numel() != 1:
            raise ValueError(
                f"Accelerator.backward() got a loss of shape {tuple(loss.shape)}: MoMo needs the one number whose "
                "gradient is taken; reduce it first, for example with loss.mean()."
            )
        loss = loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
        self._local = loss if self._local is None else self._local + loss
        if last:
            total, work = self._local.clone(), None
            if dist.is_initialized() and dist.get_world_size() > 1:
                work = dist.all_reduce(total, async_op=True)
            self._reduced.append((total, work))
            self._local = None

    def clip(self, factor: Tensor) -> None:
        """Note that the gradients of this window were scaled by min(1, factor)."""
        self._clip_factor = factor if self._clip_factor is None else self._clip_factor.minimum(factor)

    def clear(self) -> None:
        """Forget the window: its step was taken, was skipped by a loss scaler, or its gradients were zeroed."""
        for _, work in self._reduced:
            if work is not None:
                work.wait()
        self._local, self._reduced, self._clip_factor = None, [], None

    def warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message)

    def _before_step(self, optimizer: MomoOptimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        # `args` holds the optimizer itself and perhaps a closure.
        if not self._reduced or optimizer.has_loss or any(v is not None for v in (*args[1:], *kwargs.values())):
            return
        for _, work in self._reduced:
            if work is not None:
                work.wait()
        ranks = dist.get_world_size() if self._reduced[0][1] is not None else 1
        total = sum(total for total, _ in self._reduced) / ranks
        # Parameters that FSDP keeps on the CPU take their scalars from there too.
        optimizer.set_loss(total.to(optimizer.param_groups[0]["step"].device))
        factor = self._clip_factor if self.zero is None else deepspeed.clip_factor(self.zero)
        if factor is not None:
            optimizer.set_clip_factor(factor)
        self.clear()
        self._steps += 1

    def look_at(self, optimizer: MomoOptimizer) -> None:
        """Between two steps, now and then: warn of a stalled run and of skipped steps."""
        if self._steps == 0 or self._steps % CHECK_EVERY != 0:
            return
        group = optimizer.param_groups[0]
        if group["stalled"] >= CHECK_EVERY:
            self.warn_once(
                "stalled",
                f"The loss has been at or below lb={float(group['fstar']):g} for {int(group['stalled'])} steps, so MoMo's "
                "steps are 0 and training stalls. Give a lower `lb`: a number that the loss never falls below.",
            )
        skipped = int(group["skipped"])
        if skipped > self._skipped_seen:
            logger.warning(
                f"MoMo skipped {skipped - self._skipped_seen} of the last {CHECK_EVERY} steps because the loss or a "
                f"gradient was not finite ({skipped} in all); nothing was changed by them."
            )
            self._skipped_seen = skipped


_WINDOWS: "WeakKeyDictionary[MomoOptimizer, LossWindow]" = WeakKeyDictionary()


def unwrap_optimizer(optimizer: Any) -> MomoOptimizer | None:
    """The MoMo optimizer inside the wrappers of accelerate and DeepSpeed, or None if there is another one inside."""
    while optimizer is not None and not isinstance(optimizer, MomoOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def find_optimizer(accelerator: Accelerator) -> MomoOptimizer | None:
    """The MoMo optimizer that this Accelerator prepared, or None.

    Raises:
        ValueError: it prepared two of them.
    """
    found = {id(o): o for o in map(unwrap_optimizer, accelerator._optimizers) if o is not None}
    if len(found) > 1:
        raise ValueError(
            f"This Accelerator prepared {len(found)} MoMo optimizers, and a loss can only belong to one. Put the "
            "parameters into one optimizer as parameter groups, or use one Accelerator for each."
        )
    return next(iter(found.values()), None)


def _window(optimizer: MomoOptimizer) -> LossWindow:
    if optimizer not in _WINDOWS:
        _WINDOWS[optimizer] = LossWindow(optimizer)
    return _WINDOWS[optimizer]


def momo_metrics(optimizer: Any) -> dict[str, float]:
    """The numbers to log, read from the device; call it at logging steps only.

    Args:
        optimizer: a MoMo optimizer, prepared by accelerate or not.

    Returns:
        `momo/effective_lr` (τρ, comparable with the lr of Adam or SGD; of the group with the largest `lr`), `momo/polyak_lr` (the same without the cap),
        `momo/lb` (the lower bound in use), `momo/loss_avg` (f̄/ρ), `momo/skipped` (steps dropped so far because
        something was not finite); an empty dict for another optimizer.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return {}
    group = optimizer.param_groups[0]
    names = ("polyak_lr", "fstar", "loss_avg", "step", "skipped")
    effective_lr = torch.stack([g["effective_lr"] for g in optimizer.param_groups]).max()
    values = torch.stack([effective_lr, *(group[name] for name in names)]).tolist()
    effective_lr, polyak_lr, fstar, loss_avg, step, skipped = values
    beta = group["beta"] if "beta" in group else group["betas"][0]
    rho = 1 - beta**step if group["bias_correction"] and step > 0 else 1.0
    return {
        "momo/effective_lr": effective_lr,
        "momo/polyak_lr": polyak_lr,
        "momo/lb": fstar,
        "momo/loss_avg": loss_avg / rho,
        "momo/skipped": skipped,
    }


def _backward(original: Callable) -> Callable:
    @functools.wraps(original)
    def backward(self: Accelerator, loss: Tensor, **kwargs: Any) -> Any:
        optimizer = find_optimizer(self)
        if optimizer is None:
            return original(self, loss, **kwargs)
        window = _window(optimizer)
        if self.sync_gradients:
            window.look_at(optimizer)
        if self.distributed_type == DistributedType.FSDP and not self.is_fsdp2:
            raise ValueError("MoMo does not run under FSDP1. Set `fsdp_version: 2` in the accelerate config.")
        zero = self.distributed_type == DistributedType.DEEPSPEED
        divisor = self.gradient_accumulation_steps
        if zero:
            engine = self.deepspeed_engine_wrapped.engine
            window.zero = window.zero or deepspeed.connect(engine, optimizer)
            divisor = engine.gradient_accumulation_steps() if kwargs.get("scale_wrt_gas", True) else 1
        window.add(loss.detach() / divisor, last=self.sync_gradients)
        try:
            result = original(self, loss, **kwargs)
        except BaseException:
            window.clear()
            raise
        if zero and self.sync_gradients:
            window.clear()
        return result

    return backward


def _clip_grad_norm_(original: Callable) -> Callable:
    @functools.wraps(original)
    def clip_grad_norm_(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        optimizer = find_optimizer(self)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = original(self, parameters, max_norm, norm_type)
        if optimizer is None or not math.isfinite(max_norm) or self.distributed_type == DistributedType.DEEPSPEED:
            return norm
        window = _window(optimizer)
        if not self.sync_gradients:
            window.warn_once(
                "clip",
                "clip_grad_norm_ was called before the last micro-batch of a step; MoMo cannot tell its model of the "
                "loss about that. Clip under `if accelerator.sync_gradients:`.",
            )
            return norm
        if not _covers(parameters, optimizer):
            window.warn_once(
                "partial clip",
                "clip_grad_norm_ was called for a part of the parameters. MoMo scales the loss by the smallest factor, "
                "which is safe but shortens the steps of the rest; clip all parameters in one call.",
            )
        total = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        window.clip(max_norm / (total.detach() + 1e-6))
        return norm

    return clip_grad_norm_


def _covers(parameters: Iterable[Tensor], optimizer: MomoOptimizer) -> bool:
    clipped = set(map(id, parameters))
    return all(id(p) in clipped for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _clip_grad_value_(original: Callable) -> Callable:
    @functools.wraps(original)
    def clip_grad_value_(self: Accelerator, parameters: Any, clip_value: float) -> Any:
        if find_optimizer(self) is not None:
            raise ValueError(
                f"clip_grad_value_(clip_value={clip_value}) changes the direction of the gradient, and MoMo's model of "
                "the loss would be wrong. Use clip_grad_norm_ instead."
            )
        return original(self, parameters, clip_value)

    return clip_grad_value_


def _then_clear(original: Callable) -> Callable:
    """After a step was attempted or the gradients were zeroed, the loss of the window is spent."""

    @functools.wraps(original)
    def method(self: AcceleratedOptimizer, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        optimizer = unwrap_optimizer(self)
        if optimizer in _WINDOWS and self.gradient_state.sync_gradients:
            _WINDOWS[optimizer].clear()
        return result

    return method


_installed = False


def install() -> None:
    """Wrap the methods of accelerate that a training loop calls; once."""
    global _installed
    if _installed:
        return
    _installed = True
    Accelerator.backward = _backward(Accelerator.backward)
    Accelerator.clip_grad_norm_ = _clip_grad_norm_(Accelerator.clip_grad_norm_)
    Accelerator.clip_grad_value_ = _clip_grad_value_(Accelerator.clip_grad_value_)
    AcceleratedOptimizer.step = _then_clear(AcceleratedOptimizer.step)
    AcceleratedOptimizer.zero_grad = _then_clear(AcceleratedOptimizer.zero_grad)
    deepspeed.install()
