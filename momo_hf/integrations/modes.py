"""A word where a model is evaluated or read while the optimizer that averages its weights is in train mode, in any loop.

`model.eval()` says that an evaluation is to come, and the first forward pass without gradients after it that it is there: by
then `optimizer.eval()` must have been called. `model.state_dict()` is what all that saves weights calls. A model that no
optimizer of ours averages goes its way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from momo_hf.integrations.weights import CALLED, READ, RESUMES, say, training
from momo_hf.integrations.wrapping import wrap_once


_WATCHED = "_momo_hf_watched"


def _eval(original: Callable) -> Callable:
    def eval(self: nn.Module) -> nn.Module:
        model = original(self)
        if optimizers := training(self):
            _watch(self, optimizers[0].state)
        return model

    return eval


def _watch(model: nn.Module, averaged: Any) -> None:
    """Look at the next forward pass of a part of the model that has averaged weights itself: whatever runs the model runs it."""
    for module in model.modules():
        if any(p in averaged for p in module.parameters(recurse=False)):
            if not hasattr(module, _WATCHED):
                setattr(module, _WATCHED, (module.register_forward_pre_hook(_look), type(model).__name__))
            return


def _look(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled():
        return
    handle, name = getattr(module, _WATCHED)
    handle.remove()  # a model that is pickled needs nothing of ours
    delattr(module, _WATCHED)
    for optimizer in training(module):
        say(CALLED, name, optimizer)


def _state_dict(original: Callable) -> Callable:
    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        # Modules call it for their parts, and give them where to write.
        whole = not args and kwargs.get("destination") is None and not kwargs.get("keep_vars")
        if whole and not RESUMES.get():
            for optimizer in training(self):
                say(READ, type(self).__name__, optimizer)
        return found

    return state_dict


def install() -> None:
    """Wrap `eval` and `state_dict` of torch's modules; once."""
    wrap_once(nn.Module, "eval", _eval)
    wrap_once(nn.Module, "state_dict", _state_dict)
