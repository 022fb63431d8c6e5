"""Averaged iterates in several processes: FSDP2 in its forms, DDP, Trainer's checkpoints, torch.distributed.checkpoint."""

import os
import unittest.mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import TrainingArguments

from momo_hf import MomoAdam
from momo_hf.optim.steps import outside
from tests.distributed.workers import accelerator_for, full, pretend, reset, rows_of
from tests.distributed.workers_fsdp2 import Calls, OddNet, start
from tests.distributed.workers_trainer import KINDS, Config, InOrder, Model
from tests.toys import Net, Points


def weights(model):
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


def bare(kind, dtype="float64", steps=12, changes=False):
    """fully_shard without accelerate, with empty shards, frozen and unused parameters, two groups and decay; a NaN, too. Perhaps
    something else changes parameters in both modes.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dtype = getattr(torch, dtype)
    model, data = OddNet(dtype=dtype), Points(dtype=dtype)
    if kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "offload":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "fsdp2":
        fully_shard(model.first)
        fully_shard(model)
    groups = [
        {"params": list(model.first.parameters())},
        {"params": [p for n, p in model.named_parameters() if "first" not in n], "lr": 0.3},
    ]
    optimizer = MomoAdam(groups, lr=1.0, weight_decay=0.01, averaging=True)
    log = []
    for step in range(steps):
        size = 12 // world
        begin = step * 12 % 24 + rank * size
        loss = model(data.inputs[begin : begin + size], data.labels[begin : begin + size], step)
        loss.backward()
        if step == 5 and rank % 2 == (world > 1):  # one shard, in all its replicas
            grad = model.first.weight.grad
            (grad.to_local() if hasattr(grad, "to_local") else grad).fill_(float("nan"))
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss = loss / world
        calls = Calls()
        with calls:
            optimizer.step(loss=loss)
        optimizer.zero_grad()
        group = optimizer.param_groups[0]
        log.append(
            [float(group[name]) for name in ("effective_lr", "gap_avg", "weight_sum", "skipped")] + [calls.count]
        )
        if step == 7:
            modes = Calls()
            with modes:
                optimizer.eval()
                optimizer.train()
            assert modes.count == 0
        if changes and step in (2, 8):
            replace(optimizer, model)
        if changes and step > 8:
            mask(model)
    y = weights(model)
    optimizer.eval()
    return {"log": torch.tensor(log, dtype=torch.float64), "y": y, "x": weights(model)}


@torch.no_grad()
def replace(optimizer, model):
    """Other weights in eval mode, for training to begin at."""
    optimizer.eval()
    for p in model.parameters():
        p.mul_(0.5).add_(0.1)
    optimizer.train()


@torch.no_grad()
def mask(model):
    """In train mode."""
    model.first.weight.mul_((model.first.weight > 0.1).to(model.first.weight))


def alone(folder):
    runs = {dtype: bare("plain", dtype) for dtype in ("float64", "float32")}
    return runs | {"changed": bare("plain", changes=True), "loop": loop("ddp"), **lookups("ddp")}


def sharded(folder, kinds):
    start()
    made = {f"{kind} {dtype}": bare(kind, dtype) for kind in kinds.split(",") for dtype in ("float64", "float32")}
    with unittest.mock.patch.object(outside.logger, "warning") as said:
        changed = {f"{kind} changed": bare(kind, changes=True) for kind in kinds.split(",")}
    return made | changed | {"said": said.call_count}


class Lookup(nn.Module):
    """A table most of whose rows are seldom looked up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.output = nn.Embedding(12, 3), nn.Linear(3, 3)

    def forward(self, inputs, labels):
        places = (inputs[:, 0].abs() * 6).long().clamp(max=11)
        return {"loss": (self.output(self.table(places)) - labels).square().mean()}


def loop(kind, steps=50, net=Net, lr=1.0):
    """A loop on accelerate with evaluations in between; in float32."""
    accelerator = accelerator_for(kind)
    model, data = net(), Points()
    made = MomoAdam(model.parameters(), lr=lr, weight_decay=0.01, averaging=True)
    model, optimizer = accelerator.prepare(model, made)
    for step in range(steps):
        optimizer.train()
        rows = rows_of(step, accelerator.process_index, accelerator.num_processes, 1, 0)
        accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            optimizer.eval()
    assert not made.searching
    y = weights(model)
    optimizer.eval()
    marks = {name: made.param_groups[0].get(name) for name in ("tables", "embeddings")}
    return {"y": y, "x": weights(model), **marks}


def loops(folder):
    made = {kind: loop(kind) for kind in ("ddp", "fsdp2")}
    return made | {f"{kind} {name}": run for kind in ("ddp", "fsdp2") for name, run in lookups(kind).items()}


def lookups(kind):
    """With an lr that is given, and after a search, when embeddings and others have caps of their own."""
    return {"lookup": loop(kind, net=Lookup), "lookup auto": loop(kind, steps=90, net=Lookup, lr="auto")}


def checkpoints(folder):
    """In each mode, a run that saves and one that continues from there."""
    start()
    return {
        mode: [checkpoint(f"{folder}/{mode}", mode), checkpoint(folder, mode, f"{folder}/{mode}/dcp")]
        for mode in ("train", "eval")
    }


def checkpoint(folder, mode, resume=""):
    """torch.distributed.checkpoint: save after 4 of 8 steps in a mode, or continue from there; bfloat16."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, data = Net(dtype=torch.bfloat16), Points(dtype=torch.bfloat16)
    fully_shard(model)
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters(), "lr": 0.3}]
    optimizer = MomoAdam(groups, lr=1.0, averaging=True)
    first = 0
    if resume:
        loaded, state = get_state_dict(model, optimizer)
        dcp.load({"model": loaded, "optimizer": state}, checkpoint_id=resume)
        set_state_dict(model, optimizer, model_state_dict=loaded, optim_state_dict=state)
        assert optimizer.trains == (mode == "train")
        first = 4
    for step in range(first, 8):
        if step == 4 and not resume:
            getattr(optimizer, mode)()
            held, state = get_state_dict(model, optimizer)
            dcp.save({"model": held, "optimizer": state}, checkpoint_id=f"{folder}/dcp")
        optimizer.train()
        size = 12 // world
        begin = step * 12 % 24 + rank * size
        loss = model(data.inputs[begin : begin + size], data.labels[begin : begin + size])["loss"]
        loss.backward()
        total = loss.detach().float()
        dist.all_reduce(total)
        optimizer.step(loss=total / world)
        optimizer.zero_grad()
    optimizer.eval()
    return weights(model)


def trainer(folder, kind):
    """A Trainer that saves after 4 of 6 steps, and one that continues from there: their weights, and those in the file."""
    return [trained(f"{folder}/whole", kind), trained(f"{folder}/resumed", kind, f"{folder}/whole/checkpoint-4")]


def trained(folder, kind, resume=None):
    reset()
    options = {}
    if kind != "plain":
        pretend(kind)
        options["accelerator_config"] = {"use_configured_state": True}
    args = TrainingArguments(
        output_dir=folder, optim="momo_adam", optim_args="averaging=true", learning_rate=1.0, max_steps=6,
        per_device_train_batch_size=12 // dist_size(), logging_steps=1, save_steps=4, report_to="none", disable_tqdm=True,
        lr_scheduler_type="constant", use_cpu=kind == "plain", **KINDS[kind], **options,
    )  # fmt: skip
    torch.manual_seed(0)
    made = InOrder(Model(Config()), args, train_dataset=Points())
    made.train(resume_from_checkpoint=resume)
    made.save_model(f"{folder}/end")
    if dist_size() > 1:
        dist.barrier()
    return {"model": weights(made.model), "file": load_file(f"{folder}/end/model.safetensors")}


def dist_size():
    return int(os.environ["WORLD_SIZE"])
