"""Wrappers of torch that divide an optimizer, so that its parts cannot know of each other."""

import sys
from types import FrameType


SHARDED = (
    "torch's ZeroRedundancyOptimizer makes an optimizer of a part of the parameters on every one of the {count} processes, and "
    "{name} has one step size for all of them, so that every process would take another one. To share the memory of the state "
    "use FSDP2 (torch.distributed.fsdp.fully_shard) or DeepSpeed's ZeRO through accelerate; otherwise build {name} of all "
    "parameters under DistributedDataParallel."
)


def refuse_parts(name: str) -> None:
    """Raise a RuntimeError where a wrapper is about to make one of several parts of an optimizer.

    It says so nowhere, so that its functions are looked for among those that are running.

    Args:
        name: of the optimizer's class.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer) and caller.world_size > 1:
            raise RuntimeError(SHARDED.format(name=name, count=caller.world_size))
        frame = frame.f_back
