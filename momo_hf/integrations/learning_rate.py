"""Whether the learning rate of a Trainer was chosen, and what to say about it as the cap of MoMo's steps."""

import inspect
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from momo_hf.integrations.names import METHODS
from momo_hf.optim import MomoAdam, MomoOptimizer
from momo_hf.optim.auto import base_rates, caps_before_schedules
from momo_hf.optim.steps.search import AUTO


# Below this a learning rate is one for fine-tuning.
FINE_TUNING = 1e-4


def learning_rate_unset(args: TrainingArguments) -> bool:
    """Whether nobody chose `args.learning_rate`, so that it is the default of the class of the arguments.

    A number that was given, in code, on the command line or in a file, is another object than the default even where the
    two are equal. Arguments that were pickled know no difference; there an equal number counts as left alone.
    """
    # trl copies a TrainingArguments into its SFTConfig, and so the default of one class into another.
    defaults = [vars(cls).get("learning_rate") for cls in type(args).__mro__]
    if any(args.learning_rate is default for default in defaults):
        return True
    return args.learning_rate == type(args).learning_rate and were_loaded(args)


def nothing_chosen(args: TrainingArguments) -> bool:
    """Whether learning rate and optimizer are the defaults. An optimizer that was given by the name of the default looks the same."""
    (default,) = (f.default for f in fields(args) if f.name == "optim")
    return learning_rate_unset(args) and getattr(args.optim, "value", args.optim) == getattr(default, "value", default)


def were_loaded(args: TrainingArguments) -> bool:
    """Whether the arguments hold none of the defaults of their class themselves, because they were unpickled."""
    defaults = {f.name: f.default for f in fields(args) if type(f.default) is float and f.name != "learning_rate"}
    return not any(getattr(args, name) is default for name, default in defaults.items())


def lr_of(optimizer: MomoOptimizer) -> float:
    """The `lr` that was given, before any schedule; the largest of several groups. The device is read."""
    return max(base_rates(optimizer.param_groups))


def cap_of(optimizer: MomoOptimizer) -> float | None:
    """The upper bound of the step size before any schedule: what a search has found, None while it goes on, or `lr`.

    Of several groups it is that of the largest `lr`. The device is read.
    """
    caps = caps_before_schedules(optimizer.param_groups)
    return None if caps is None else max(caps)


def note_at_start(args: TrainingArguments, optimizer: MomoOptimizer) -> str:
    """What became of a learning rate that was given beside a name that searches for one; empty where that is plain.

    It is said when training begins, because only then it is known whether a checkpoint brought another one.

    Args:
        args: of the Trainer.
        optimizer: the MoMo optimizer itself, without wrappers.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in METHODS or learning_rate_unset(args):
        return ""
    if (search := optimizer.search) is not None:
        bound = "is searched for" if search.cap is None else f"was found by a search: {cap_of(optimizer):.3g}"
        return f"learning_rate={args.learning_rate:g} is not used, because the upper bound of the step size {bound}."
    if METHODS[name][1].get("lr") == AUTO and lr_of(optimizer) == args.learning_rate:
        return (
            f"learning_rate={args.learning_rate:g} was given, so it is the upper bound of the step size, and none is "
            "searched for. Leave learning_rate out to have it found."
        )
    return ""


def warning_at_start(args: TrainingArguments, optimizer: MomoOptimizer, model: Any) -> str | None:
    """What to say about the cap before training, or None if there is nothing to say, as where it is searched for.

    Args:
        args: of the Trainer.
        optimizer: the MoMo optimizer itself, without wrappers.
        model: the Trainer's.
    """
    alone = learning_rate_unset(args)
    kind = next((c.__name__ for c in type(args).__mro__ if vars(c).get("learning_rate") == args.learning_rate), "")
    if optimizer.search is not None:
        if not alone or not were_loaded(args):
            return None
        return (
            f"The arguments were loaded, so nobody knows whether learning_rate={args.learning_rate:g}, the default of "
            f"{kind}, was chosen. It is taken as left alone, and the upper bound of the step size is searched for; for "
            "another bound give a number that differs from the default."
        )
    cap = lr_of(optimizer)
    if alone and cap == args.learning_rate:
        return (
            f"learning_rate was left at {cap:g}, the default of {kind}. For MoMo it is the upper bound of the step "
            "size: right for fine-tuning a pretrained model, far too low for training from scratch; there, "
            f"{advice(optimizer)}."
        )
    if cap < FINE_TUNING and is_new(model):
        return (
            f"The upper bound of the step size, learning_rate={cap:g}, is one for fine-tuning, and this model is new: it "
            f"does not come from a checkpoint. To train it from scratch, {advice(optimizer)}."
        )
    return None


def warning_at_end(optimizer: MomoOptimizer, capped: float) -> str:
    """What to say after training; empty if the cap was searched for, or decided less than nearly all steps.

    Args:
        optimizer: the MoMo optimizer itself, without wrappers.
        capped: the part of the steps on which the cap decided.
    """
    if capped < 0.95 or optimizer.search is not None:
        return ""
    return (
        f" So nearly every step was one that a learning rate of {lr_of(optimizer):g} gives without MoMo. That is right "
        f"for fine-tuning; to let the loss choose the step size, {advice(optimizer)}."
    )


def advice(optimizer: MomoOptimizer) -> str:
    """What to try where a cap that was given is too low."""
    cap, lr = lr_of(optimizer), inspect.signature(type(optimizer)).parameters.get("lr")
    default = 0.0 if lr is None or lr.default is lr.empty else lr.default
    preset = 'optim="momo_adam_auto" without a learning_rate, which searches for it'
    if cap >= default:
        return f"raise learning_rate above {cap:g}, or try {preset}"
    for_transformers = " (for a transformer 0.001 and a warmup)" if isinstance(optimizer, MomoAdam) else ""
    return f"try learning_rate={default:g}, the default of {type(optimizer).__name__}{for_transformers}, or {preset}"


def is_new(model: Any) -> bool:
    """Whether the weights of a transformers model are known not to come from `from_pretrained`."""
    return isinstance(model, PreTrainedModel) and not model.name_or_path
