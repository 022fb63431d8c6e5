"""What differs between the supported versions of other packages: each with the reason, and when it can go.

Nothing here imports more than its caller has imported already.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch


def compile_options() -> dict[str, Any]:
    """Options of `torch.compile` for a function that is compiled once for each of several methods.

    Without `isolate_recompiles`, which torch 2.6 has not, all of them share one limit on compilations, and beyond it run
    uncompiled: slower, and no different. Goes when every supported torch has it.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def fsdp_param_groups(module: Any) -> list[Any]:
    """The parameter groups of a module under FSDP2.

    torch 2.6 keeps one group per module, in `_fsdp_param_group`; later versions keep a list. Goes when every supported
    torch has the list.
    """
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def removed_pipeline_tasks() -> dict[str, Any]:
    """The tasks that `transformers.pipeline` refuses even where a package has registered them.

    transformers 4 has no such list: it removed no task. Goes with transformers 4.
    """
    from transformers import pipelines

    return getattr(pipelines, "REMOVED_TASKS", {})


def sort_checkpoints(folder: str) -> list[str]:
    """The checkpoints in a folder, those that were written first before others.

    transformers 4 has it as a method of the Trainer only. Goes with transformers 4.
    """
    from transformers import Trainer, TrainerState, trainer_utils

    if hasattr(trainer_utils, "sort_checkpoints"):
        return trainer_utils.sort_checkpoints(folder, use_mtime=True)
    trainer: Any = Trainer.__new__(Trainer)
    trainer.state = TrainerState()
    return trainer._sorted_checkpoints(folder, use_mtime=True)


def untraced(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The function, to be called by torch.compile and not traced; the reason is shown where that is an error.

    torch 2.6 takes no reason. Goes when every supported torch does.
    """
    known = inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(function, **({"reason": reason} if "reason" in known else {}))


def config_dataclass(cls: type) -> type:
    """Makes the fields of a `PretrainedConfig` its arguments; a class decorator.

    transformers 5 does so for every subclass, transformers 4 for none. Goes with transformers 4.
    """
    from transformers import PretrainedConfig

    if dataclasses.is_dataclass(PretrainedConfig):
        return cls
    fields = dataclasses.fields(dataclasses.dataclass(init=False, repr=False, eq=False)(cls))

    def __init__(self: Any, **kwargs: Any) -> None:
        for field in fields:
            made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            setattr(self, field.name, kwargs.pop(field.name, made))
        PretrainedConfig.__init__(self, **kwargs)

    cls.__init__ = __init__
    return cls


def training_arguments(arguments: list[str]) -> list[str]:
    """A command line for TrainingArguments in which `--warmup_steps` may be a share of the run, below 1.

    transformers 5 takes it like this, transformers 4 as `--warmup_ratio`. Goes with transformers 4.
    """
    from transformers import TrainingArguments

    if TrainingArguments.__dataclass_fields__["warmup_steps"].type is float:
        return arguments
    known: list[str] = []
    for argument in arguments:
        after_name = known[-1:] == ["--warmup_steps"]
        value = argument if after_name else argument.partition("--warmup_steps=")[2]
        if value and float(value) < 1:
            known[len(known) - after_name :] = ["--warmup_steps=0", f"--warmup_ratio={value}"]
        else:
            known.append(argument)
    return known
