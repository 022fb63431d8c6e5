"""fully_shard without accelerate: shapes and situations that a sharded optimizer meets."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from momo_hf import MomoAdam
from momo_hf.optim.kernels import compiled as passes
from momo_hf.optim.steps import movement
from momo_hf.optim.tensors import chunks
from tests.distributed.workers import METHODS, full
from tests.toys import Net, Points


class OddNet(Net):
    """With a scalar that leaves the other ranks an empty shard, a frozen layer, and a branch used on even steps only."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.frozen = nn.Linear(5, 5, dtype=dtype).requires_grad_(False)
        self.branch = nn.Linear(5, 3, dtype=dtype)

    def forward(self, inputs, labels, step):
        outputs = self.scale * self.second(torch.tanh(self.first(inputs + self.frozen(inputs))))
        if step % 2 == 0:
            outputs = outputs + self.branch(inputs)
        return (outputs - labels).square().mean()


def train(kind, method="momo_adam", dtype=torch.float64, steps=12):
    """The same net on the same global batch in one process, sharded, or in part sharded; the loss is given by hand."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model, data = OddNet(dtype=dtype), Points(dtype=dtype)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "mixed":
        fully_shard(model.first)
    elif kind == "offload":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind in ("fsdp2", "compiled"):
        fully_shard(model.first)
        fully_shard(model)
    groups = [
        {"params": list(model.first.parameters())},
        {"params": [p for n, p in model.named_parameters() if "first" not in n], "lr": 0.3},
    ]
    optimizer = METHODS[method](groups, lr=1.0, weight_decay=0.01, compile=kind == "compiled")
    log = []
    for step in range(steps):
        size = 12 // world
        start = step * 12 % 24 + rank * size
        loss = model(data.inputs[start : start + size], data.labels[start : start + size], step)
        loss.backward()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss = loss / world
        if kind == "mixed":
            for p in model.parameters():
                if type(p.data) is torch.Tensor and p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= world
        calls = Calls()
        with calls:
            optimizer.step(loss=loss)
        optimizer.zero_grad()
        log.append([float(optimizer.param_groups[0]["effective_lr"]), float(calls.count)])
    return {
        "log": torch.tensor(log, dtype=torch.float64),
        "weights": {n: full(p) for n, p in model.named_parameters()},
    }


class Calls:
    """Counts the collectives that are started inside, by whomever."""

    count = 0

    def __enter__(self):
        self._original = dist.all_reduce

        def counted(*args, **kwargs):
            self.count += 1
            return self._original(*args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_):
        dist.all_reduce = self._original


def start():
    dist.init_process_group("gloo")


def alone(folder):
    return {
        f"{method} {dtype}": train("plain", method, getattr(torch, dtype))
        for method in METHODS
        for dtype in ("float64", "float32")
    }


def sharded(folder, kinds):
    start()
    return {
        f"{kind} {method} {dtype}": train(kind, method, getattr(torch, dtype))
        for kind in kinds.split(",")
        for method in METHODS
        for dtype in ("float64", "float32")
    }


def compiled(folder):
    start()
    chunks.PACKED = passes.WORTH = passes.ROW = 1  # nothing is too small to be compiled
    found = train("compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return found


def non_finite(folder):
    """One rank meets a NaN, in its gradient or in its loss: no rank may move, and all must count."""
    start()
    results = {}
    for where in ("grad", "loss"):
        model, data = Net(dtype=torch.float64), Points(dtype=torch.float64)
        fully_shard(model)
        optimizer = MomoAdam(model.parameters(), lr=1.0)
        for step in range(3):
            loss = model(data.inputs, data.labels)["loss"]
            loss.backward()
            total = loss.detach().clone()
            before = {n: full(p) for n, p in model.named_parameters()}
            if step == 1 and dist.get_rank() == 1:
                if where == "grad":
                    model.first.weight.grad.to_local().fill_(float("nan"))
                else:
                    total.fill_(float("nan"))
            dist.all_reduce(total)
            optimizer.step(loss=total / 2)
            optimizer.zero_grad()
            after = {n: full(p) for n, p in model.named_parameters()}
            moved = any(not torch.equal(before[n], after[n]) for n in before)
            results[f"{where} {step}"] = [float(moved), float(optimizer.param_groups[0]["skipped"])]
    return results


def followed(folder):
    """bfloat16 parameters that round, one that joins late, one changed from outside, a saved state; DTensor losses."""
    start()
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))

    def spread(tensor, placement=None):
        return distribute_tensor(tensor, mesh, [placement or Shard(0)]) if world > 1 else tensor

    reads = []
    original = movement.overlap
    movement.overlap = lambda bucket: reads.append(step) or original(bucket)
    params = [nn.Parameter(spread(torch.linspace(-1, 2, n).bfloat16())) for n in (7, 5, 1)]
    optimizer, log = MomoAdam(params, lr=10.0), []
    for step in range(30):
        values = [full(p) for p in params]
        for i, (p, x) in enumerate(zip(params, values)):
            p.grad = spread(torch.cos(3 * x + step)) if (i, step >= 4) != (1, False) else None
        loss = torch.stack([torch.sin(3 * x.float() + step).sum() for x in values]).sum() / 300 + 0.1
        optimizer.step(loss=spread(loss, Replicate()))
        log.append(float(optimizer.param_groups[0]["effective_lr"]))
        if step == 9:
            with torch.no_grad():
                params[0].clamp_(-0.5, 0.5)
        if step == 19:
            state = optimizer.state_dict()
            optimizer = MomoAdam(params, lr=10.0)
            optimizer.load_state_dict(state)
    movement.overlap = original
    counts = [float(optimizer.state[p].get("start", 0.0)) for p in params]
    return {
        "log": torch.tensor(log),
        "weights": [full(p) for p in params],
        "reads": sorted(set(reads)),
        "counts": counts,
    }


def checkpoint(folder, resume=""):
    """torch.distributed.checkpoint: save after 4 of 8 steps, or continue from there; bf16 parameters and two groups."""
    start()
    world, rank = dist.get_world_size(), dist.get_rank()
    model, data = Net(dtype=torch.bfloat16), Points(dtype=torch.bfloat16)
    fully_shard(model)
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters(), "lr": 0.3}]
    optimizer = MomoAdam(groups, lr=1.0, use_fstar=True)
    first, log = 0, []
    if resume:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=resume)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = 4
    for step in range(first, 8):
        if step == 4 and not resume:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/dcp")
        size = 12 // world
        begin = step * 12 % 24 + rank * size
        loss = model(data.inputs[begin : begin + size], data.labels[begin : begin + size])["loss"]
        loss.backward()
        total = loss.detach().float()
        dist.all_reduce(total)
        optimizer.step(loss=total / world)
        optimizer.zero_grad()
        log.append([float(g[name]) for g in optimizer.param_groups for name in ("effective_lr", "drift", "fstar")])
    dtypes = sorted({str(v.dtype) for entry in optimizer.state.values() for v in entry.values()})
    return {"log": torch.tensor(log), "weights": {n: full(p) for n, p in model.named_parameters()}, "dtypes": dtypes}
