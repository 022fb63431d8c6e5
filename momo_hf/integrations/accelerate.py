"""The loss and the clip factor, from any Accelerator to the MoMo optimizers that it prepared.

`Accelerator.backward` is the one place that every loop passes: Trainer, the trainers of other packages and loops
written by hand, with DeepSpeed even the place where the step itself is taken. So that is where the loss is read.
An Accelerator without a MoMo optimizer behaves as before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from momo_hf.integrations import deepspeed, saving
from momo_hf.integrations.gradients import Snapshot, models_of, note_model
from momo_hf.integrations.tables import mark_tables
from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.integrations.window import LossAccumulator, average
from momo_hf.integrations.wrapping import wrap_once
from momo_hf.optim import MomoOptimizer
from momo_hf.optim.tensors.sharding import whole


# What a prepared optimizer passes on to the MoMo optimizer in it.
BY_HAND = ("set_loss", "set_clip_factor", "set_lb", "drop_loss", "has_loss", "search")


def windows_of(accelerator: Accelerator) -> list[LossAccumulator]:
    """The windows of the MoMo optimizers that this Accelerator prepared."""
    found = {id(o): o for o in map(unwrap_optimizer, accelerator._optimizers) if o is not None}
    return [window_of(optimizer, accelerator) for optimizer in found.values()]


def window_of(optimizer: MomoOptimizer, accelerator: Accelerator) -> LossAccumulator:
    """Where the loss of an optimizer is kept; made at its first use."""
    if not isinstance(optimizer.loss_source, LossAccumulator):
        optimizer.loss_source = LossAccumulator(optimizer)
    optimizer.loss_source.connect(accelerator)
    return optimizer.loss_source


def momo_metrics(optimizer: Any) -> dict[str, float]:
    """Return the numbers to log. This reads the device, so call it at logging steps only.

    Args:
        optimizer: a MoMo optimizer, prepared by accelerate or not.

    Returns:
        `momo/effective_lr` (the step size τρ, comparable with the lr of Adam or SGD; that of the group with the largest `lr`),
        `momo/cap` (its upper bound, after the schedule; during a search, the size of its steps), `momo/polyak_lr` (the step
        size without the cap), `momo/lb` (the lower bound in use), `momo/loss_avg` (the losses before any clipping, averaged
        with β and corrected for the start; during a search, the last loss) and `momo/skipped` (steps dropped so far because
        something was not finite). For any other optimizer, an empty dict.
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return {}
    group = optimizer.param_groups[0]
    names = ("polyak_lr", "fstar", "raw_loss_avg", "step", "skipped")
    effective_lr = torch.stack([g["effective_lr"] for g in optimizer.param_groups]).max()
    values = torch.stack([effective_lr, optimizer.cap(), *(group[name] for name in names)]).tolist()
    effective_lr, cap, polyak_lr, fstar, loss_avg, step, skipped = values
    beta = group["beta"] if "beta" in group else group["betas"][0]
    rho = 1 - beta**step if group["bias_correction"] and step > 0 else 1.0
    # During a search, and at its last step, there is no average yet.
    if step == 0 and (search := optimizer.search) is not None and search.losses:
        loss_avg, polyak_lr = search.losses[-1], effective_lr
    return {
        "momo/effective_lr": effective_lr,
        "momo/cap": cap,
        "momo/polyak_lr": polyak_lr,
        "momo/lb": fstar,
        "momo/loss_avg": loss_avg / rho,
        "momo/skipped": skipped,
    }


def _backward(original: Callable) -> Callable:
    def backward(self: Accelerator, loss: Tensor, **kwargs: Any) -> Any:
        windows = windows_of(self)
        if not windows:
            return original(self, loss, **kwargs)
        if self.distributed_type == DistributedType.FSDP and not self.is_fsdp2:
            raise ValueError("MoMo does not run under FSDP1. Set `fsdp_version: 2` in the accelerate config.")
        if self.distributed_type == DistributedType.DEEPSPEED:
            return _backward_with_zero(original, self, windows, loss, kwargs)
        own_loss = _one_number(loss) / self.gradient_accumulation_steps
        if kwargs.get("gradient") is not None:
            own_loss = own_loss * _one_number(kwargs["gradient"])
        for window in windows:
            window.settle()
        # Before the backward pass, so that it costs no waiting; whom it feeds is known only afterwards.
        averages = average(windows, own_loss)
        before = [Snapshot(window.held()) for window in windows]
        try:
            result = original(self, loss, **kwargs)
        except BaseException:
            for window in windows:
                window.remember()
            raise
        after = [window.held() for window in windows]
        fed = [i for i, gradients in enumerate(after) if before[i].written(gradients)]
        if len(fed) > 1:
            raise ValueError(
                f"One backward pass put gradients into the parameters of {len(fed)} MoMo optimizers, and a loss can only "
                "belong to one. Put the parameters into one optimizer as parameter groups, or freeze the other model "
                "during this pass: model.requires_grad_(False). An optimizer that you do not use any more goes with "
                "accelerator.free_memory()."
            )
        for i in fed:
            windows[i].add(own_loss, averages[i])
        for window, gradients in zip(windows, after):
            window.remember(gradients)
        return result

    return backward


def _backward_with_zero(
    original: Callable, accelerator: Accelerator, windows: list[LossAccumulator], loss: Tensor, kwargs: dict[str, Any]
) -> Any:
    """ZeRO holds the gradients of its one model itself, and takes the step within the last backward pass."""
    (window,) = windows
    wrapped: Any = accelerator.deepspeed_engine_wrapped  # for a type checker None, which it is at first
    engine = wrapped.engine
    window.zero = window.zero or deepspeed.connect(engine, window.optimizer)
    divisor = engine.gradient_accumulation_steps() if kwargs.get("scale_wrt_gas", True) else 1
    own_loss, last = _one_number(loss) / divisor, accelerator.sync_gradients
    before = window.sums
    window.add(own_loss, average([window], own_loss)[0] if last else None)
    try:
        result = original(accelerator, loss, **kwargs)
    except BaseException:
        window.sums = before
        raise
    if last:
        window.clear()
    return result


def _one_number(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"Accelerator.backward() got a loss of shape {tuple(loss.shape)}: MoMo needs the one number whose "
            "gradient is taken; reduce it first, for example with loss.mean()."
        )
    loss = whole(loss.detach())
    return loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))


def _clip_grad_norm_(original: Callable) -> Callable:
    def clip_grad_norm_(
        self: Accelerator, parameters: Any, max_norm: float | None, norm_type: float = 2
    ) -> Tensor | None:
        windows = windows_of(self)
        if not windows or self.distributed_type == DistributedType.DEEPSPEED:
            return original(self, parameters, max_norm, norm_type)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        max_norm = math.inf if max_norm is None else float(max_norm)
        for window in windows:
            window.settle()
        norm = original(self, parameters, max_norm, norm_type)
        for window in windows:
            window.clip(parameters, norm, max_norm)
            window.remember()
        return norm

    return clip_grad_norm_


def _clip_grad_value_(original: Callable) -> Callable:
    def clip_grad_value_(self: Accelerator, parameters: Any, clip_value: float) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any(window.owns(parameters) for window in windows_of(self)):
            raise ValueError(
                f"clip_grad_value_(clip_value={clip_value}) changes the direction of the gradient, and MoMo's model of "
                "the loss would be wrong. Use clip_grad_norm_ instead."
            )
        return original(self, parameters, clip_value)

    return clip_grad_value_


def _prepare(original: Callable) -> Callable:
    def prepare(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        # Before FSDP2 exchanges the parameters, whose places in the groups stay the same.
        models = [*(model for model in args if isinstance(model, torch.nn.Module)), *models_of(self)]
        for optimizer in (*args, *self._optimizers):
            for model in models:
                mark_tables(model, optimizer)
        return original(self, *args, **kwargs)

    return prepare


def _prepare_optimizer(original: Callable) -> Callable:
    def prepare_optimizer(self: Accelerator, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # Losses that are given by hand need the averaging too, also where no backward pass goes through here.
        if (inner := unwrap_optimizer(optimizer)) is not None:
            window_of(inner, self)
        return original(self, optimizer, *args, **kwargs)

    return prepare_optimizer


def _prepare_model(original: Callable) -> Callable:
    def prepare_model(self: Accelerator, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, model, *args, **kwargs)
        note_model(self, prepared)
        return prepared

    return prepare_model


def _step(original: Callable) -> Callable:
    def step(self: AcceleratedOptimizer, closure: Callable | None = None, **given: Any) -> Any:
        optimizer = unwrap_optimizer(self)
        if optimizer is not None and "loss" in given:
            optimizer.set_loss(given.pop("loss"))
        if optimizer is None or given:
            return original(self, closure, **given)
        window = optimizer.loss_source
        if not isinstance(window, LossAccumulator) or not self.gradient_state.sync_gradients:
            return original(self, closure)
        if self.scaler is not None:
            window.trust()
        result = original(self, closure)
        if self.scaler is not None and self.step_was_skipped:
            if (optimizer.has_loss or not window.empty) and optimizer.searching:
                # Nothing is taken in, but the search hears of it, and may have to go back to finite losses.
                optimizer.step()
            window.clear()
            optimizer.drop_loss()
        window.remember()
        return result

    return step


def _by_hand(self: AcceleratedOptimizer, name: str) -> Any:
    """What a prepared optimizer has where there is a MoMo optimizer inside: `set_loss` and its like and `search`."""
    optimizer = unwrap_optimizer(self)
    if optimizer is None:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    return getattr(optimizer, name)


def install() -> None:
    """Wrap the methods of accelerate that a training loop calls; once, however often it is called."""
    for owner, name, wrap in (
        (Accelerator, "backward", _backward),
        (Accelerator, "clip_grad_norm_", _clip_grad_norm_),
        (Accelerator, "clip_grad_value_", _clip_grad_value_),
        (Accelerator, "prepare", _prepare),
        (Accelerator, "prepare_model", _prepare_model),
        (Accelerator, "prepare_optimizer", _prepare_optimizer),
        (AcceleratedOptimizer, "step", _step),
    ):
        wrap_once(owner, name, wrap)
    for name in BY_HAND:
        setattr(AcceleratedOptimizer, name, property(functools.partial(_by_hand, name=name)))
    deepspeed.install()
    saving.install()
