"""Which weights are in a model while its optimizer averages, and how the averaged ones get there for a while."""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from momo_hf.compat import fsdp_param_groups
from momo_hf.optim import MomoOptimizer
from momo_hf.optim.stateful import LIVING


logger = logging.getLogger(__name__)

CALLED = (
    "A {model} in eval mode was called while its optimizer averages and is in train mode, so what is evaluated is the point where "
    "gradients are taken, and not the averaged weights. Call optimizer.eval() beside model.eval(), and optimizer.train() beside "
    "model.train()."
)
READ = (
    "The weights of a {model} were read while its optimizer averages and is in train mode: they are the point where gradients are "
    "taken, to resume from with optimizer.state_dict(). Before weights are evaluated or published, call optimizer.eval()."
)
AVERAGED = (
    "The averaged weights of a {model} were saved while its optimizer is in train mode. They are the ones to evaluate and publish; to "
    "resume, save optimizer.state_dict() beside them after optimizer.eval(), or use Accelerator.save_state."
)

# Whether what is read now is for a checkpoint, beside the state of the optimizer.
RESUMES: ContextVar[bool] = ContextVar("RESUMES", default=False)
_SAID: WeakKeyDictionary[MomoOptimizer, set[str]] = WeakKeyDictionary()


def unwrap_optimizer(optimizer: Any) -> MomoOptimizer | None:
    """The MoMo optimizer inside the wrappers of accelerate and DeepSpeed, or None if there is another one inside."""
    while optimizer is not None and not isinstance(optimizer, MomoOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def training(model: nn.Module) -> list[MomoOptimizer]:
    """The optimizers that average weights of a model, and have the point of gradients in it now."""
    living = (o for o in LIVING if isinstance(o, MomoOptimizer))
    candidates = [o for o in living if o.averages and o.trains and not o.searching]
    if not candidates:
        return []
    params = list(parameters_of_model(model))
    return [o for o in candidates if any(p in o.state for p in params)]


def parameters_of_model(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of a model; where FSDP2 has left whole ones in it after a forward pass, those that an optimizer has too."""
    yield from model.parameters()
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            yield from (param.sharded_param for group in fsdp_param_groups(module) for param in group.fsdp_params)


def say(message: str, model: str, optimizer: MomoOptimizer) -> None:
    """Say one of the sentences above about a model, by the name of its class, once for an optimizer; on the first process."""
    said = _SAID.setdefault(optimizer, set())
    if message not in said and not (dist.is_initialized() and dist.get_rank() > 0):
        logger.warning(message.format(model=model))
    said.add(message)


@contextlib.contextmanager
def averaged_weights(*optimizers: MomoOptimizer | None, keep: bool = True) -> Iterator[None]:
    """Have the averaged weights in the parameters for a while, where optimizers average.

    Args:
        optimizers: without wrappers; None is left out.
        keep: keep a copy of the parameters meanwhile, so that they come back bit for bit: perhaps one process of several
            saves, and the others change nothing. Without, they come back as those of a run that is resumed from x.
    """
    to_switch = [o for o in optimizers if o is not None and o.averages and o.trains]
    params = [p for o in to_switch if keep for group in o.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for optimizer in to_switch:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in to_switch:
            optimizer.train()
        with torch.no_grad():
            for p, value in zip(params, before):
                p.copy_(value)
        for optimizer in to_switch:
            optimizer.leave()
