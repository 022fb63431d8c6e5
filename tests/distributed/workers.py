"""What the worker processes do: the same training in one process and in several, sharded and not."""

import contextlib
import importlib

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin

from momo_hf import Momo, MomoAdam
from tests.toys import Net, Points


METHODS = {"momo": Momo, "momo_adam": MomoAdam}
SCALARS = ("effective_lr", "loss_avg", "drift")


def reset():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def pretend(kind):
    """accelerate offers FSDP and DeepSpeed on accelerators only, so it is told that these gloo processes have some.

    And DeepSpeed is kept from compiling what it has for CPUs alone and does not use in training, which takes a minute.
    """
    reset()
    if kind == "zero":
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = {
        "fsdp2": DistributedType.MULTI_GPU,
        "zero": DistributedType.DEEPSPEED,
    }[kind]


def accelerator_for(kind, **options):
    """An Accelerator on gloo and the CPU."""
    if kind == "ddp":
        reset()
        return Accelerator(cpu=True, **options)
    pretend("fsdp2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1,
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    return Accelerator(fsdp_plugin=plugin, **options)


def rows_of(step, rank, world, accumulation, micro, batch=12):
    """This rank's part of a micro-batch of the global batch of a step."""
    size = batch // (world * accumulation)
    start = (step * batch + (rank * accumulation + micro) * size) % 24
    return slice(start, start + size)


def train(kind, method="momo_adam", dtype=torch.float64, steps=20, accumulation=1, clip=0.0, **options):
    """Train a small net on the same global batches, whatever the number of processes; returns step sizes and weights."""
    accelerator = accelerator_for(kind, gradient_accumulation_steps=accumulation)
    model, data = Net(dtype=dtype), Points(dtype=dtype)
    optimizer = METHODS[method](model.parameters(), **{"lr": 1.0, "weight_decay": 0.01, **options})
    model, optimizer = accelerator.prepare(model, optimizer)
    log = []
    for step in range(steps):
        for micro in range(accumulation):
            rows = rows_of(step, accelerator.process_index, accelerator.num_processes, accumulation, micro)
            with accelerator.accumulate(model) if accumulation > 1 else contextlib.nullcontext():
                accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        log.append([float(optimizer.param_groups[0][name]) for name in SCALARS])
    weights = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
    return {"log": torch.tensor(log, dtype=torch.float64), "weights": weights}


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def matrix(folder, kind):
    """Every combination that has to give the same step sizes."""
    results = {}
    for method in METHODS:
        for dtype in (torch.float64, torch.float32):
            for accumulation, clip in ((1, 0.0), (2, 0.5)):
                key = f"{method} {str(dtype).removeprefix('torch.')} {accumulation} {clip}"
                results[key] = train(kind, method, dtype, accumulation=accumulation, clip=clip)
    results["momo_adam float32 2 0.0"] = train(kind, "momo_adam", torch.float32, accumulation=2)
    return results


def long_run(folder, kind):
    """50 steps, for the comparison of ranks."""
    return train(kind, dtype=torch.float32, steps=50)["weights"]


def collectives(folder, kind):
    """What happens in the steps of an accumulated run, in order: our collectives, backward passes and steps."""
    events = []
    original = torch.distributed.all_reduce

    def recorded(tensor, *args, async_op=False, **kwargs):
        events.append(f"all_reduce {tensor.numel()} {'async' if async_op else 'waits'}")
        return original(tensor, *args, async_op=async_op, **kwargs)

    torch.distributed.all_reduce = recorded
    accelerator = accelerator_for(kind, gradient_accumulation_steps=2)
    model, data = Net(width=40), Points()
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=1.0))
    for _ in range(4):
        with accelerator.accumulate(model):
            loss = model(data.inputs, data.labels)["loss"]
            loss.register_hook(lambda grad: events.append("backward"))
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients:
                events.append("step")
            optimizer.zero_grad()
    torch.distributed.all_reduce = original
    return events


def saved(folder, kind, save_at="", resume=""):
    """Train 8 steps with accelerate, saving or resuming by `save_state`; returns step sizes and weights."""
    # accelerate would otherwise step the scheduler once for every process, so that the lr depends on their number.
    accelerator = accelerator_for(kind, step_scheduler_with_optimizer=False)
    model, data = Net(dtype=torch.float64), Points(dtype=torch.float64)
    optimizer = MomoAdam(model.parameters(), lr=1.0, weight_decay=0.01, use_fstar=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    first = 0
    if resume:
        accelerator.load_state(resume)
        first = 4
    log = []
    for step in range(first, 8):
        if save_at and step == int(save_at):
            accelerator.save_state(f"{folder}/state")
        rows = rows_of(step, accelerator.process_index, accelerator.num_processes, 1, 0)
        accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.append([float(optimizer.param_groups[0][name]) for name in SCALARS])
    weights = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
    return {"log": torch.tensor(log, dtype=torch.float64), "weights": weights}


def saved_and_resumed(folder, kind):
    """A run that saves on its way, and its continuation from there."""
    return [saved(folder, kind, save_at="4"), saved(folder, kind, resume=f"{folder}/state")]
