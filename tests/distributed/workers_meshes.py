"""Four worker processes in the meshes of accelerate's ParallelismConfig, and one without."""

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.integrations import tensor_parallel

from momo_hf import MomoAdam
from tests.distributed.workers import accelerator_for, pretend, rows_of
from tests.distributed.workers_processes import scalars, weights
from tests.toys import Net, Points


def meshes(folder):
    """Step sizes and weights under accelerate's ParallelismConfig on four processes."""
    sizes = {
        "tp": {"tp_size": 4},
        "dp x tp": {"dp_shard_size": 2, "tp_size": 2},
        "cp": {"cp_size": 4},
        "dp x cp": {"dp_shard_size": 2, "cp_size": 2},
        "dp x dp": {"dp_replicate_size": 2, "dp_shard_size": 2},
    }
    return {name: on_mesh(**size) for name, size in sizes.items()}


def on_mesh(**sizes):
    """Five steps of a net whose batch is shared by tensor-parallel processes and split among all others."""
    pretend("fsdp2")
    config = ParallelismConfig(**sizes)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
    )
    sharded = config.dp_shard_enabled or config.cp_enabled
    accelerator = Accelerator(parallelism_config=config, fsdp_plugin=plugin if sharded else None)
    model, mesh = Net(width=8, dtype=torch.float64), accelerator.torch_device_mesh
    if config.tp_enabled:
        # accelerate 1.15 imports this name, which transformers 5.24 has no longer, and uses it for other parameters only.
        tensor_parallel.ReplicateParallel = None
        parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
        model.tp_size = config.tp_size
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=1.0, weight_decay=0.01))
    rank, world = 0, 1
    for name in (name for name in mesh.mesh_dim_names if name != "tp"):
        rank, world = rank * mesh[name].size() + mesh.get_local_rank(name), world * mesh[name].size()
    return five_steps(accelerator, model, optimizer, rank, world)


def without_mesh(folder):
    """The same on one process."""
    accelerator, model = accelerator_for("ddp"), Net(width=8, dtype=torch.float64)
    made = accelerator.prepare(model, MomoAdam(model.parameters(), lr=1.0, weight_decay=0.01))
    return five_steps(accelerator, *made, rank=0, world=1)


def five_steps(accelerator, model, optimizer, rank, world):
    data, log = Points(dtype=torch.float64), []
    for step in range(5):
        rows = rows_of(step, rank, world, 1, 0)
        accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        log.append(scalars(optimizer))
    return {"log": torch.tensor(log), "weights": weights(model)}
