"""What `optim="momo_adam"` and the other names make in a Trainer, and trainers that show what they do."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, modelcard
from transformers.training_args import OptimizerNames

from momo_hf.integrations import evaluating
from momo_hf.integrations.callback import MomoCallback
from momo_hf.integrations.groups import muon_groups
from momo_hf.integrations.learning_rate import learning_rate_unset, nothing_chosen
from momo_hf.integrations.model_card import extract_hyperparameters
from momo_hf.integrations.names import BEST, METHODS
from momo_hf.integrations.smoothing import watch_smoothing
from momo_hf.integrations.weights import averaged_weights, unwrap_optimizer
from momo_hf.integrations.wrapping import wrap_once
from momo_hf.optim import MomoMuon, MomoOptimizer
from momo_hf.optim.steps.search import AUTO


logger = logging.getLogger(__name__)


# ---- Names ----


def momo_kwargs(args: TrainingArguments, cls: type[MomoOptimizer]) -> dict[str, Any]:
    """Translate TrainingArguments into the arguments of a MoMo optimizer.

    Args:
        args: of these, `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `optim_args` are used;
            with "lr=auto" in `optim_args` the optimizer searches for its cap and `learning_rate` is not used.
        cls: the optimizer class.

    Returns:
        Keyword arguments for `cls`, for `Trainer(optimizer_cls_and_kwargs=(cls, momo_kwargs(args, cls)))`.

    Raises:
        ValueError: `optim_args` has an unknown key or a value of the wrong type, or `optim_target_modules` is set.
    """
    named = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "beta": args.adam_beta1,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    signature = inspect.signature(cls).parameters
    if args.optim_target_modules is not None:
        raise ValueError(
            f"optim_target_modules={args.optim_target_modules!r} names the layers for low-rank projections, which "
            f"{cls.__name__} does not make. Leave it out; to train some of the layers only, freeze the others."
        )
    kwargs = {name: value for name, value in named.items() if name in signature}
    free = {name: p for name, p in signature.items() if name not in (*named, "params")}
    for item in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, _, text = item.partition("=")
        if key == "lr" and text == AUTO:
            kwargs["lr"] = AUTO
        elif key not in free:
            raise ValueError(
                f"`optim_args` has no key {key!r} for {cls.__name__}; it takes lr={AUTO}, {', '.join(free)}. A learning "
                "rate, weight decay, betas and epsilon are TrainingArguments of their own."
            )
        else:
            kwargs[key] = _typed(key, text, free[key].annotation)
    return kwargs


def _typed(key: str, text: str, annotation: Any) -> bool | float | str:
    flags = {"true": True, "1": True, "false": False, "0": False}
    try:
        if annotation is float or (annotation == bool | float and text.lower() not in flags):
            return float(text)
        if annotation is str or (annotation == bool | str and text.lower() not in flags):
            return text
        return flags[text.lower()]
    except (KeyError, ValueError):
        kind = {float: "a number", bool | float: "true, false or a number"}.get(annotation, "true or false")
        raise ValueError(f"`optim_args`: {key} must be {kind}, got {text!r}.") from None


def _kwargs_by_name(
    cls: type[MomoOptimizer], preset: dict[str, Any], args: TrainingArguments, model: Any
) -> dict[str, Any]:
    kwargs, say = {**preset, **momo_kwargs(args, cls)}, logger.warning if args.process_index == 0 else logger.debug
    if preset.get("lr") == AUTO and learning_rate_unset(args):
        kwargs["lr"] = AUTO
    if issubclass(cls, MomoMuon):
        if args.deepspeed_plugin is not None:
            raise ValueError(
                f"optim={args.optim!r} needs whole matrices, and ZeRO has flat parts of them: launch with "
                "configs/accelerate/fsdp2.yaml, or take optim=momo_adam."
            )
        if model is not None:
            kwargs["params"] = muon_groups(model, args.weight_decay)
    if args.deepspeed_plugin is not None and preset.get("averaging"):
        kwargs["averaging"] = False
        say("Under DeepSpeed the iterates are not averaged, so take a schedule that decays, such as linear.")
    if args.deepspeed_plugin is not None and model is not None:
        # ZeRO steps on every group by itself, and one step size for all needs a single one.
        kwargs["params"] = [p for p in model.parameters() if p.requires_grad]
        if args.weight_decay:
            logger.warning(
                f"Under DeepSpeed all parameters are one group, so weight_decay={args.weight_decay} acts on biases and "
                "norms too."
            )
    return kwargs


def _get_optimizer_cls_and_kwargs(original: Callable) -> Callable:
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        name = getattr(args.optim, "value", args.optim)
        if name not in METHODS:
            return original(args, model)
        cls, preset = METHODS[name]
        return cls, _kwargs_by_name(cls, preset, args, model)

    return get_optimizer_cls_and_kwargs


# ---- Trainers ----


def callback_of(trainer: Trainer) -> MomoCallback | None:
    """The callback that goes with a MoMo optimizer, if a Trainer has it."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, MomoCallback)), None)


def equip(trainer: Trainer) -> None:
    """Give a Trainer whose optimizer is a MoMo one what goes with it: the callback, the bound of smoothed labels."""
    # A few trainers make their optimizer before their callbacks, and log for themselves.
    handler = getattr(trainer, "callback_handler", None)
    if handler is None or unwrap_optimizer(trainer.optimizer) is None:
        return
    callback = callback_of(trainer) or MomoCallback()
    # First in the list, so that every tracker after it sees the numbers.
    handler.callbacks[:] = [callback, *(c for c in handler.callbacks if c is not callback)]
    watch_smoothing(trainer)


def _then_equip(original: Callable) -> Callable:
    def create(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        created = original(self, *args, **kwargs)
        equip(self)
        return created

    return create


def _refresh_batch_norm(trainer: Trainer) -> None:
    if (callback := callback_of(trainer)) is not None:
        callback.batch_norm.refresh(trainer)


def _evaluation_loop(original: Callable) -> Callable:
    def evaluation_loop(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        _refresh_batch_norm(self)
        return original(self, *args, **kwargs)

    return evaluation_loop


def _save_model(original: Callable) -> Callable:
    def save_model(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with averaged_weights(unwrap_optimizer(self.optimizer)):
            _refresh_batch_norm(self)
            return original(self, *args, **kwargs)

    return save_model


def _save_checkpoint(original: Callable) -> Callable:
    def save_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with averaged_weights(unwrap_optimizer(self.optimizer), keep=False):
            return original(self, *args, **kwargs)

    return save_checkpoint


def _load_best_model(original: Callable) -> Callable:
    def load_best_model(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        # Training is over. In train mode, what is loaded would be taken for the point of gradients.
        if (optimizer := unwrap_optimizer(self.optimizer)) is not None:
            optimizer.eval()
        return original(self, *args, **kwargs)

    return load_best_model


def equip_trainers() -> None:
    """Equip every Trainer when it creates its optimizer or, where its class does that itself, its scheduler; and save the
    averaged weights where iterates are averaged, in checkpoints beside a state of the same mode.
    """
    wrap_once(Trainer, "create_optimizer", _then_equip)
    wrap_once(Trainer, "create_scheduler", _then_equip)
    wrap_once(Trainer, "evaluation_loop", _evaluation_loop)
    wrap_once(Trainer, "save_model", _save_model)
    wrap_once(Trainer, "_save_checkpoint", _save_checkpoint)
    wrap_once(Trainer, "_load_best_model", _load_best_model)
    evaluating.install()
    wrap_once(modelcard, "extract_hyperparameters_from_trainer", extract_hyperparameters)


class MomoTrainerMixin(Trainer):
    """Mixin for a Trainer class that creates its optimizer and scheduler itself: `class MyTrainer(MomoTrainerMixin, Theirs): ...`.

    If neither an optimizer nor a learning rate was chosen, it takes `optim="momo_muon_auto"` and says so. Everything else that it
    adds, every other Trainer gets by itself: `MomoCallback`, and the known lower bound of a label-smoothed loss.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as the Trainer would, or `momo_muon_auto` if nothing was chosen."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and nothing_chosen(self.args):
            self.args.optim = OptimizerNames(BEST)
            logger.warning(
                f"{type(self).__name__}: no optimizer and no learning rate were chosen, so optim={BEST} is taken, which finds its "
                "learning rate itself and averages the weights. Give `optim` or `learning_rate` for another one."
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        equip(self)
        return optimizer


class MomoTrainer(MomoTrainerMixin):
    """`transformers.Trainer` with nothing to choose: without `optim` and `learning_rate` it trains with the preset that has the best
    evidence, `momo_muon_auto`, and says so; see `MomoTrainerMixin`.
    """


def install() -> None:
    """Let every Trainer make our optimizers by name and equip it; once, however often it is called.

    transformers 4 and 5 both turn a name into an optimizer in this static method.
    """
    wrap_once(Trainer, "get_optimizer_cls_and_kwargs", _get_optimizer_cls_and_kwargs)
    equip_trainers()
