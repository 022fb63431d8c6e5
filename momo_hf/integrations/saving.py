"""Models that are saved to be used get the averaged weights, in whatever event or loop they are saved."""

import copy
import sys
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

from momo_hf.integrations.weights import AVERAGED, READ, RESUMES, averaged_weights, say, training, unwrap_optimizer
from momo_hf.integrations.wrapping import wrap_once


# What has a `save_pretrained` of its own, by the module that brings it.
PRETRAINED = {
    "transformers.modeling_utils": "PreTrainedModel",
    "peft.peft_model": "PeftModel",
    "diffusers.models.modeling_utils": "ModelMixin",
}


def _save_pretrained(original: Callable) -> Callable:
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        optimizers, resumes = training(self), RESUMES.get()
        for optimizer in optimizers:
            say(READ if resumes else AVERAGED, type(self).__name__, optimizer)
        # Beside the state of an optimizer in train mode only the point of gradients is right.
        with averaged_weights(*(() if resumes else optimizers)):
            return original(self, *args, **kwargs)

    return save_pretrained


def _get_state_dict(original: Callable) -> Callable:
    def get_state_dict(self: Accelerator, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        optimizers = [] if RESUMES.get() else training(model)
        if not optimizers:
            return original(self, model, *args, **kwargs)
        for optimizer in optimizers:
            say(AVERAGED, type(model).__name__, optimizer)
        with averaged_weights(*optimizers):
            found = original(self, model, *args, **kwargs)
            # Mostly they are the parameters themselves; what is collected from several processes is a copy already.
            return found if self.distributed_type == DistributedType.FSDP else copy.deepcopy(found)

    return get_state_dict


def _save_model(original: Callable) -> Callable:
    def save_model(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        with averaged_weights(*map(unwrap_optimizer, self._optimizers)):
            return original(self, *args, **kwargs)

    return save_model


def _beside_the_state(original: Callable) -> Callable:
    def save_or_load(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        token = RESUMES.set(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            RESUMES.reset(token)

    return save_or_load


def install() -> None:
    """Wrap what saves models in accelerate, and in transformers, peft and diffusers where they are imported; once."""
    wrap_once(Accelerator, "save_model", _save_model)
    for name in ("save_state", "load_state"):
        wrap_once(Accelerator, name, _beside_the_state)
    wrap_once(Accelerator, "get_state_dict", _get_state_dict)
    for module, name in PRETRAINED.items():
        if (owner := getattr(sys.modules.get(module), name, None)) is not None:
            wrap_once(owner, "save_pretrained", _save_pretrained)
