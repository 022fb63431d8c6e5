"""What ZeRO needs: one step size over its flat partitions, and refusals that name the fix.

ZeRO calls the optimizer's `step()` inside `engine.step()`, once for every parameter group (stages 1 and 2) or
sub-group (stage 3), with flat partitions of the parameters in float32. One step size for the whole model therefore
needs one group and one sub-group. Gradients are clipped inside the engine too, which knows their norm by then.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import accelerator as accelerate_module

from momo_hf.integrations.wrapping import wrap_once
from momo_hf.optim import MomoOptimizer


def connect(engine: Any, optimizer: MomoOptimizer) -> Any:
    """Make a MoMo optimizer sum over ZeRO's partitions.

    Args:
        engine: the DeepSpeed engine.
        optimizer: the MoMo optimizer inside it.

    Returns:
        ZeRO's own optimizer, for `clip_factor`.

    Raises:
        ValueError: the engine steps in a way in which there is no single step size.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        raise ValueError(
            "MoMo does not run under DeepSpeed with ZeRO stage 0, which is plain data parallelism: set "
            '`"zero_optimization": {"stage": 1}` in the DeepSpeed config, or launch with configs/accelerate/ddp.yaml.'
        )
    if optimizer.averages:
        raise ValueError(
            "averaging does not run under DeepSpeed: ZeRO keeps its own copy of the weights, and the averaged ones "
            "would never reach the model. Leave averaging out, or launch with configs/accelerate/fsdp2.yaml."
        )
    zero = engine.optimizer
    groups = len(optimizer.param_groups)
    if groups > 1:
        raise ValueError(
            f"ZeRO steps on {groups} parameter groups one after the other, and MoMo needs one step size for all. Pass "
            "one group: MomoAdam(model.parameters(), ...), or with Trainer `optim: momo_adam`, which does so by itself."
        )
    sub_groups = len(zero.fp16_groups) if stage == 3 else 1
    if sub_groups > 1:
        raise ValueError(
            f"ZeRO stage 3 splits the parameters into {sub_groups} sub-groups and steps on each, and MoMo needs one step "
            'size for all. Set `"zero_optimization": {"sub_group_size": 1e15}` in the DeepSpeed config.'
        )
    if stage == 3:
        _clear_padding(zero)
    optimizer.shard_group = zero.dp_process_group
    return zero


@torch.no_grad()
def _clear_padding(zero: Any) -> None:
    """Stage 3 ends the partition of a parameter with memory that nobody has written, and 0 times a NaN is no 0."""
    rank = dist.get_rank(zero.dp_process_group)
    (params,), (flat,) = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    for param, part in zip(params, flat.split([param.partition_numel() for param in params])):
        used = max(param.ds_numel - rank * part.numel(), 0)
        part[used:].zero_()


def clip_factor(zero: Any) -> Any:
    """κ of the step that the engine is about to take, or None where it does not clip."""
    norm = zero._global_grad_norm
    if not zero.clip_grad or norm is None:
        return None
    return zero.clip_grad / (norm + 1e-6)


def _refuse_replacement(original: Any) -> Any:
    """accelerate replaces optimizers that it does not know by DeepSpeed's CPU Adam when the state is offloaded."""

    def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
        if isinstance(optimizer, MomoOptimizer):
            raise ValueError(
                f"With `offload_optimizer`, accelerate would replace {type(optimizer).__name__} by DeepSpeedCPUAdam. Add "
                '`"zero_force_ds_cpu_optimizer": false` to the DeepSpeed config, or do not offload the optimizer.'
            )
        return original(optimizer)

    return map_pytorch_optim_to_deepspeed


def install() -> None:
    """Refuse the silent replacement; a no-op where DeepSpeed is not installed."""
    if hasattr(accelerate_module, "map_pytorch_optim_to_deepspeed"):
        wrap_once(accelerate_module, "map_pytorch_optim_to_deepspeed", _refuse_replacement)
