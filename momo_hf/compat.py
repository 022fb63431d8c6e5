"""What differs between the supported versions of other packages: each with the reason, and when it can go.

Nothing here imports more than its caller has imported already.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


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


def untraced(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The function, to be called by torch.compile and not traced; the reason is shown where that is an error.

    torch 2.6 takes no reason. Goes when every supported torch does.
    """
    known = inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(function, **({"reason": reason} if "reason" in known else {}))
