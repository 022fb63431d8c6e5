"""MomoMuon on several processes: matrices that are split in all the ways in which torch splits them."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

from momo_hf import MomoMuon
from tests.distributed.workers import full
from tests.toys import Points


class Matrices(nn.Module):
    """Three matrices of one shape, of which some processes hold no row, a tall one, the kernel of a convolution, and vectors."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5, dtype=dtype) for _ in range(3))
        self.tall = nn.Linear(5, 11, dtype=dtype)
        self.kernel = nn.Conv1d(1, 2, 3, dtype=dtype)
        self.head = nn.Linear(18, 3, dtype=dtype)

    def forward(self, inputs, labels):
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        inputs = self.kernel(torch.tanh(self.tall(inputs)).unsqueeze(1)).flatten(1)
        return (self.head(inputs) - labels).square().mean()

    def groups(self):
        matrices = [p for n, p in self.named_parameters() if p.ndim > 1 and "head" not in n]
        others = [p for n, p in self.named_parameters() if p.ndim == 1 or "head" in n]
        return [{"params": matrices, "method": "muon"}, {"params": others, "lr": 0.01}]


def split(model, kind):
    """Split the parameters of a model."""
    world = dist.get_world_size()
    if kind == "fsdp2":
        fully_shard(model.layers[1])
        fully_shard(model)
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "rows and columns":
        mesh = init_device_mesh("cpu", (2, world // 2))

        def spread(_, module, mesh):
            for name, p in list(module.named_parameters(recurse=False)):
                places = [Shard(0), Shard(1)] if p.ndim > 1 else [Replicate(), Shard(0)]
                setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, places)))

        distribute_module(model, mesh, spread)
    elif kind == "replicas":
        return nn.parallel.DistributedDataParallel(model)
    return model


def train(kind, steps=6, dtype=torch.float64, **options):
    """The same model on the same batch in one process and split; the gradients are those of the whole batch."""
    data = Points(dtype=dtype)
    model = Matrices(dtype)
    groups = model.groups
    held = split(model, kind) if kind else model
    search = {"lr": "auto"} if options.get("lr") == "auto" else {}
    optimizer = MomoMuon([{**group, **search} for group in groups()], **{"lr": 0.05, "weight_decay": 0.1, **options})
    log = []
    for step in range(steps):
        rows = slice(step * 6 % 24, step * 6 % 24 + 6)
        loss = loss_and_gradients(model, held, data.inputs[rows], data.labels[rows])
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        log.append(float(optimizer.param_groups[0]["effective_lr"]))
    optimizer.eval()
    names = [(n, p) for n, p in model.named_parameters()]
    return {"log": torch.tensor(log), "weights": {n: full(p) for n, p in names}, "optimizer": optimizer}


def loss_and_gradients(model, held, inputs, labels):
    """By the model itself; or, where no parallel layer computes with what it holds, by a copy that is not split."""
    if not any(p.placements.count(Shard(1)) for p in model.parameters() if hasattr(p, "placements")):
        loss = held(inputs, labels)
        loss.backward()
        return loss.detach()
    whole = Matrices(inputs.dtype)
    with torch.no_grad():
        for mine, p in zip(whole.parameters(), model.parameters()):
            mine.copy_(full(p))
    loss = whole(inputs, labels)
    loss.backward()
    for mine, p in zip(whole.parameters(), model.parameters()):
        p.grad = distribute_tensor(mine.grad, p.device_mesh, p.placements)
    return loss.detach()


OPTIONS = {
    "plain": {},
    "no decay at y": {"divide": False},
    "averaging": {"averaging": True},
    "search": {"lr": "auto", "averaging": True, "steps": 70},
}


def run(folder, *kinds):
    """Step sizes and weights of every kind and every set of options."""
    found = {}
    if kinds:
        dist.init_process_group("gloo")
    for kind in kinds or (None,):
        for name, options in OPTIONS.items():
            made = train(kind, **options)
            found[f"{kind} {name}" if kind else name] = {key: made[key] for key in ("log", "weights")}
    return found


def shares(folder):
    """The matrices of which each process computes the direction, and the bytes that it sends."""
    dist.init_process_group("gloo")
    method, seen = MomoMuon.methods["muon"], []
    original = type(method).direction

    def direction(self, vector, buffers, options):
        seen.append(tuple(vector.shape))
        return original(self, vector, buffers, options)

    type(method).direction = direction
    train("fsdp2", steps=1)
    return seen
