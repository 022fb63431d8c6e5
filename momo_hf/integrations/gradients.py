"""Where an optimizer's gradients are, and over which processes a backward pass averages them.

Both are read off the prepared models: DistributedDataParallel and FSDP2 say whether they average and in which group,
and FSDP2 keeps what is not averaged yet outside of `p.grad`.
"""

from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from momo_hf.compat import fsdp_param_groups
from momo_hf.integrations.weights import parameters_of_model
from momo_hf.optim import MomoOptimizer


Groups = tuple[dist.ProcessGroup | None, ...]  # None is torch's name for all processes


class Gradients:
    """The gradients of an optimizer whose parameters belong to the models of an Accelerator.

    Args:
        accelerator: it prepared the optimizer.
        optimizer: the MoMo optimizer itself, without wrappers.

    Raises:
        ValueError: the gradients are averaged in a way that a single loss cannot follow.
    """

    def __init__(self, accelerator: Accelerator, optimizer: MomoOptimizer) -> None:
        self._accelerator, self._optimizer = accelerator, optimizer
        self.key = models_key(accelerator, optimizer)
        params = list(parameters_of(optimizer))
        owned = set(map(id, params))
        models = [m for m in models_of(accelerator) if any(id(p) in owned for p in parameters_of_model(m))]
        modules = list(chain.from_iterable(model.modules() for model in models))
        self._known = bool(models)
        self._ddp = [m for m in modules if isinstance(m, DistributedDataParallel)]
        groups = [g for m in modules if isinstance(m, FSDPModule) for g in fsdp_param_groups(m)]
        self._fsdp = [g for g in groups if any(id(p.sharded_param) in owned for p in g.fsdp_params)]
        refuse_other_parallelism(accelerator, params, modules)

    def held(self) -> list[Tensor]:
        """The gradient tensors that there are now; with FSDP2 also what later backward passes will be added to."""
        found = [p.grad for p in parameters_of(self._optimizer)]
        for param in chain.from_iterable(group.fsdp_params for group in self._fsdp):
            unsharded = getattr(param, "_unsharded_param", None)
            found += [param.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad]
        return [grad for grad in found if grad is not None]

    def averaging(self) -> Groups:
        """The groups over which a backward pass averages gradients now, one after the other; empty if it does not.

        Raises:
            ValueError: processes may leave early, so that there is nothing to average with.
        """
        for model in self._ddp:
            if model._join_config.enable:
                raise ValueError(
                    "MoMo does not run under torch's Join: it averages the loss over all processes, and those that "
                    "have run out of batches do not answer. Give every process the same number of batches: "
                    "`even_batches=True` in accelerate, or `drop_last=True` in the DataLoader."
                )
        groups: Groups
        if self._ddp:
            model = self._ddp[-1]  # the newest, where a module was wrapped again
            # accelerate's trigger_sync_in_backward sets the second one between forward and backward pass.
            averages = getattr(model, AVERAGES, model.require_backward_grad_sync) or model.require_forward_param_sync
            groups = (model.process_group,) if averages else ()
        elif self._fsdp:
            first = self._fsdp[0]
            groups = mesh_groups(first.mesh_info) if first.reduce_grads and first.all_reduce_grads else ()
        elif self._known:
            groups = ()  # not wrapped: no gradient leaves this process
        else:
            shared = self._accelerator.num_processes > 1 and self._accelerator.sync_gradients
            groups = (dist.group.WORLD,) if shared else ()
        return tuple(group for group in groups if dist.get_world_size(group) > 1)


class Snapshot:
    """Which gradient tensors there were, and how often each had been written to; it keeps none of them alive."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._seen = [(ref(grad), writes(grad)) for grad in gradients]

    def versions(self) -> dict[int, int]:
        """The count of writes by `id`, for the tensors that are still there."""
        return {id(grad): count for seen, count in self._seen if (grad := seen()) is not None}

    def kept(self, now: list[Tensor]) -> list[Tensor]:
        """Those of the gradients of now that were there then."""
        versions = self.versions()
        return [grad for grad in now if id(grad) in versions]

    def written(self, now: list[Tensor]) -> bool:
        """Whether one of the gradients of now is new or was written to since."""
        versions = self.versions()
        return any(versions.get(id(grad)) != writes(grad) for grad in now)


def writes(grad: Tensor) -> int:
    """How often a gradient was written to; an operation on a DTensor counts with it, FSDP2's own with its local part."""
    return grad._version + grad._local_tensor._version if isinstance(grad, DTensor) else grad._version


AVERAGES = "_momo_hf_averages"
# accelerate itself keeps the module that it wraps in DistributedDataParallel, and not the wrapper.
_PREPARED: WeakKeyDictionary[Accelerator, list[ref[nn.Module]]] = WeakKeyDictionary()


def note_model(accelerator: Accelerator, model: nn.Module) -> None:
    """Remember a model as the Accelerator prepared it."""
    _PREPARED.setdefault(accelerator, []).append(ref(model))
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and not hasattr(module, AVERAGES):
            module.register_forward_pre_hook(_note_averaging)


def _note_averaging(model: DistributedDataParallel, args: Any) -> None:
    # DDP decides in the forward pass whether the backward pass averages.
    if torch.is_grad_enabled():
        setattr(model, AVERAGES, model.require_backward_grad_sync)


def models_of(accelerator: Accelerator) -> list[nn.Module]:
    """The models of an Accelerator, with their wrappers."""
    prepared = [model for found in _PREPARED.get(accelerator, []) if (model := found()) is not None]
    return [*accelerator._models, *prepared]


def parameters_of(optimizer: MomoOptimizer) -> chain[Tensor]:
    """The parameters of all groups."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def models_key(accelerator: Accelerator, optimizer: MomoOptimizer) -> tuple[int, ...]:
    """What `Gradients` was made from; it has to be made anew when this changes."""
    ends = (p for group in optimizer.param_groups for p in (*group["params"][:1], *group["params"][-1:]))
    return (id(accelerator), *map(id, models_of(accelerator)), *map(id, ends))


def mesh_groups(mesh_info: Any) -> Groups:
    """The groups over which FSDP2 averages, as few as possible."""
    if mesh_info.mesh.size() == dist.get_world_size():
        return (dist.group.WORLD,)
    names = ("shard_process_group", "replicate_process_group")
    return tuple(group for name in names if (group := getattr(mesh_info, name, None)) is not None)


def refuse_other_parallelism(accelerator: Accelerator, params: list[Tensor], modules: list[nn.Module]) -> None:
    """Raise a ValueError for parallelism under which parts of the sums or of the loss are somewhere else."""
    kind = None
    configs = [getattr(getattr(m, "config", None), "distributed_config", None) for m in modules]
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        kind = "Megatron-LM"
    elif any((getattr(config, "pp_size", None) or 1) > 1 for config in configs):
        kind = "pipeline parallelism"
    elif any((getattr(config, "ep_size", None) or 1) > 1 for config in configs) or any(
        getattr(p, "allreduce", True) is False
        for p in params  # how DeepSpeed marks the experts of one process
    ):
        kind = "expert parallelism"
    if kind is not None:
        raise ValueError(
            f"MoMo does not run under {kind}: a process then holds parameters that the others do not know of, and their "
            "part of the step size is missing. Use data, fully sharded (FSDP2, ZeRO), tensor or context parallelism."
        )
