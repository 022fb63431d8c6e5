"""`optim="momo"`, `"momo_adam"` and `"momo_adam_auto"` for TrainingArguments, and trainers that show what the optimizer does."""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.trainer_pt_utils import LabelSmoother
from transformers.training_args import OptimizerNames

from momo_hf.integrations.accelerate import momo_metrics, unwrap_optimizer
from momo_hf.optim import Momo, MomoAdam, MomoAdamAuto, MomoOptimizer


logger = logging.getLogger(__name__)

METHODS: dict[str, type[MomoOptimizer]] = {"momo": Momo, "momo_adam": MomoAdam, "momo_adam_auto": MomoAdamAuto}


# ---- Names ----


def momo_kwargs(args: TrainingArguments, cls: type[MomoOptimizer]) -> dict[str, Any]:
    """Translate TrainingArguments into the arguments of a MoMo optimizer.

    Args:
        args: `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `optim_args` are used.
        cls: the optimizer class.

    For `MomoAdamAuto` a `learning_rate` left at its default means the default of the class, which needs no choice.

    Returns:
        Keyword arguments for `cls`, for `Trainer(optimizer_cls_and_kwargs=(cls, momo_kwargs(args, cls)))`.

    Raises:
        ValueError: `optim_args` has an unknown key or a value of the wrong type.
    """
    named = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "beta": args.adam_beta1,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    signature = inspect.signature(cls).parameters
    if issubclass(cls, MomoAdamAuto) and args.learning_rate == TrainingArguments.learning_rate:
        del named["lr"]
    kwargs = {name: value for name, value in named.items() if name in signature}
    free = {name: p for name, p in signature.items() if name not in (*named, "lr", "params")}
    for item in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, _, text = item.partition("=")
        if key not in free:
            raise ValueError(
                f"`optim_args` has no key {key!r} for {cls.__name__}; it takes {', '.join(free)}. The learning rate, "
                "weight decay, betas and epsilon are TrainingArguments of their own."
            )
        kwargs[key] = _typed(key, text, free[key].annotation)
    return kwargs


def _typed(key: str, text: str, annotation: Any) -> bool | float | str:
    flags = {"true": True, "1": True, "false": False, "0": False}
    try:
        if annotation is float:
            return float(text)
        if annotation is str or (annotation == bool | str and text.lower() not in flags):
            return text
        return flags[text.lower()]
    except (KeyError, ValueError):
        kind = "a number" if annotation is float else "true or false"
        raise ValueError(f"`optim_args`: {key} must be {kind}, got {text!r}.") from None


def _handler(context: OptimizerContext) -> tuple[type[MomoOptimizer], dict[str, Any]]:
    cls = METHODS[OptimizerNames(context.args.optim).value]
    kwargs = momo_kwargs(context.args, cls)
    if context.args.deepspeed_plugin is not None and context.model is not None:
        # ZeRO steps on every group by itself, and one step size for all needs a single one.
        kwargs["params"] = [p for p in context.model.parameters() if p.requires_grad]
        if context.args.weight_decay:
            logger.warning(
                f"Under DeepSpeed all parameters are one group, so weight_decay={context.args.weight_decay} acts on "
                "biases and norms too."
            )
    return cls, kwargs


def register() -> None:
    """Make the names valid wherever transformers takes the name of an optimizer; once.

    transformers has no public registry: a name is a member of the enum `OptimizerNames` and has a handler.
    """
    for value in METHODS:
        if value in OptimizerNames._value2member_map_:
            continue
        member = str.__new__(OptimizerNames, value)
        member._name_, member._value_ = value.upper(), value
        OptimizerNames._member_names_.append(member._name_)
        OptimizerNames._member_map_[member._name_] = member
        OptimizerNames._value2member_map_[value] = member
        _OPTIMIZER_HANDLERS[member] = _handler


# ---- What the user sees ----


def label_smoothing_bound(epsilon: float, classes: int) -> float:
    """The smallest cross entropy that transformers' LabelSmoother can give: the entropy of the smoothed target.

    Args:
        epsilon: the smoothing factor, in [0, 1].
        classes: number V of classes.
    """
    rest = epsilon / classes
    return -sum(count * p * math.log(p) for count, p in ((1, 1 - epsilon + rest), (classes - 1, rest)) if p > 0)


class MomoCallback(TrainerCallback):
    """Adds MoMo's numbers to the training logs, warns of a mis-set `learning_rate`, sums up at the end.

    `MomoTrainer` brings it along; for another trainer pass `callbacks=[MomoCallback()]`. It reads the device at the
    logging steps only.
    """

    def __init__(self) -> None:
        self._before = (0.0, 0.0)  # steps and capped steps at the last log
        self._effective_lrs: list[float] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._effective_lrs = []
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None:
            return
        self._before = self._counts(optimizer)
        left_alone = args.learning_rate == TrainingArguments.learning_rate
        if left_alone and not isinstance(optimizer, MomoAdamAuto) and state.is_world_process_zero:
            lr = inspect.signature(type(optimizer)).parameters.get("lr")
            default = "" if lr is None or lr.default is lr.empty else f", where {lr.default:g} is the default"
            logger.warning(
                f"learning_rate was left at {args.learning_rate:g}, the default of TrainingArguments. For MoMo it is the "
                "upper bound of the step size: right for fine-tuning a pretrained model, far too low for training from "
                f"scratch{default}."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None or logs is None or "loss" not in logs:
            return
        metrics = momo_metrics(optimizer)
        counts = self._counts(optimizer)
        steps, capped = (now - before for now, before in zip(counts, self._before))
        self._before = counts
        metrics["momo/capped"] = capped / steps if steps else 0.0
        self._effective_lrs.append(metrics["momo/effective_lr"])
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None or not self._effective_lrs or not state.is_world_process_zero:
            return
        lrs = torch.tensor(self._effective_lrs)
        steps, capped = self._counts(optimizer)
        skipped = momo_metrics(optimizer)["momo/skipped"]
        logger.warning(
            f"{type(optimizer).__name__} used step sizes from {lrs.min():.2e} to {lrs.max():.2e}, median "
            f"{lrs.median():.2e} (at the logging steps); the cap decided {capped / max(steps, 1):.0%} of {steps:.0f} "
            f"steps, and {skipped:.0f} were skipped."
        )

    @staticmethod
    def _counts(optimizer: MomoOptimizer) -> tuple[float, float]:
        group = optimizer.param_groups[0]
        return tuple(torch.stack([group["step"], group["capped"]]).tolist())


@dataclass
class BoundedLabelSmoother(LabelSmoother):
    """transformers' label smoothing, which says with how many classes it made a loss that is trained on.

    Whether the loss is the smoothed one is known nowhere else: `compute_loss_func`, an overridden `compute_loss` or a
    model that brings its own loss leave `label_smoothing_factor` without effect.
    """

    on_training_loss: Callable[[int], None] = lambda classes: None

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().__call__(model_output, labels, *args, **kwargs)
        if loss.requires_grad:
            logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
            self.on_training_loss(logits.shape[-1])
        return loss


class MomoTrainerMixin:
    """For any Trainer class: `class MyTrainer(MomoTrainerMixin, SFTTrainer): ...`.

    Adds `MomoCallback`, and gives the optimizer the known lower bound of a label-smoothed loss unless it has one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(isinstance(callback, MomoCallback) for callback in self.callback_handler.callbacks):
            # First in the list, so that every tracker after it sees the numbers.
            self.callback_handler.callbacks.insert(0, MomoCallback())
        if type(self.label_smoother) is LabelSmoother:
            known = self.label_smoother
            self.label_smoother = BoundedLabelSmoother(known.epsilon, known.ignore_index, self._bound_smoothed_loss)

    def _bound_smoothed_loss(self, classes: int) -> None:
        optimizer = unwrap_optimizer(self.optimizer)
        if optimizer is not None and optimizer.param_groups[0]["lb"] == 0:
            optimizer.set_lb(label_smoothing_bound(self.label_smoother.epsilon, classes))


class MomoTrainer(MomoTrainerMixin, Trainer):
    """`transformers.Trainer` that shows and sets what MoMo needs; see `MomoTrainerMixin`."""


class MomoSeq2SeqTrainer(MomoTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that shows and sets what MoMo needs; see `MomoTrainerMixin`."""
