"""What worker processes do to see over which processes losses are averaged."""

import contextlib
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.integrations import tensor_parallel

from momo_hf import MomoAdam
from tests.distributed.workers import accelerator_for, full, pretend, rows_of
from tests.toys import Net, Points


def suite(folder):
    """Everything that one start of the processes can show."""
    several = int(os.environ["WORLD_SIZE"]) > 1
    kinds = ("ddp", "fsdp2") if several else ("ddp",)
    results = {f"closure {clip} {parts}": closures(clip, parts) for clip in (0.0, 0.1) for parts in (1, 2)}
    for kind in kinds:
        results[f"by hand {kind}"] = by_hand(kind)
        results[f"dropped {kind}"] = dropped(kind)
    if not several:
        results["one of one"] = two_steps()
    else:
        results |= {
            "models": two_models(),
            "local sgd": local_sgd(),
            "no sync": no_sync(),
            "events": events(),
            "join": join(),
        }
    return results


def prepared(kind="ddp", lr=1.0, **options):
    accelerator = accelerator_for(kind, **options)
    model = Net(dtype=torch.float64)
    return accelerator, *accelerator.prepare(model, MomoAdam(model.parameters(), lr=lr))


def losses_of(accelerator, model):
    data = Points(dtype=torch.float64)

    def loss_of(step, accumulation=1, micro=0):
        rows = rows_of(step, accelerator.process_index, accelerator.num_processes, accumulation, micro)
        return model(data.inputs[rows], data.labels[rows])["loss"]

    return loss_of


def scalars(optimizer):
    return [float(optimizer.param_groups[0][name]) for name in ("effective_lr", "loss_avg")]


def weights(model):
    return torch.cat([full(p).flatten() for p in model.parameters()])


def closures(clip, accumulation):
    """Three steps by a closure that accumulates, clips and zeroes; step sizes and weights."""
    accelerator, model, optimizer = prepared()
    loss_of, log = losses_of(accelerator, model), []
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            total = 0.0
            for micro in range(accumulation):
                last = micro == accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    loss = loss_of(step, accumulation, micro) / accumulation
                    accelerator.backward(loss)
                total += loss.detach()
            if clip:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            return total

        optimizer.step(closure)
        log.append(scalars(optimizer))
    return {"log": torch.tensor(log), "weights": weights(model)}


def by_hand(kind):
    """Losses given by hand, each process its own; what is backpropagated through accelerate is not the loss."""
    accelerator, model, optimizer = prepared(kind)
    loss_of, log = losses_of(accelerator, model), []
    for step in range(3):
        loss = loss_of(step)
        optimizer.set_loss(loss)
        if step == 1:
            loss.backward()  # past accelerate
        else:
            accelerator.backward(loss + 1e3)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        log.append(scalars(optimizer))
    return {"log": torch.tensor(log), "weights": weights(model)}


def two_models():
    """A generator and a critic with a MoMo optimizer each; what they took in beside the mean of the losses."""
    accelerator = accelerator_for("ddp")
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    optimizers = [MomoAdam(m.parameters(), lr=1e-2) for m in (generator, critic)]
    generator, critic, first, second = accelerator.prepare(generator, critic, *optimizers)
    noise = torch.randn(6, 4, dtype=torch.float64) * (1 + accelerator.process_index)
    right = [0.0, 0.0]
    for step in range(4):
        turn = step % 2
        optimizer, other = (first, second) if turn == 0 else (second, first)
        frozen = critic if turn == 0 else generator
        frozen.requires_grad_(False)
        loss = critic(generator(noise)).square().mean() * (1 if turn == 0 else 3)
        accelerator.backward(loss)
        frozen.requires_grad_(True)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        right[turn] = 0.9 * right[turn] + 0.1 * float(mean) / dist.get_world_size()
    return {"found": [float(o.param_groups[0]["loss_avg"]) for o in (first, second)], "right": right}


def dropped(kind):
    """Gradients dropped in the middle of an accumulated window, in every way there is."""
    ways = {
        "model": lambda model, optimizer: model.zero_grad(),
        "in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
        "optimizer": lambda model, optimizer: optimizer.optimizer.zero_grad(),
        "kept": lambda model, optimizer: None,
    }
    results = {}
    for name, drop in ways.items():
        accelerator, model, optimizer = prepared(kind)
        data = Points(dtype=torch.float64)
        # One process takes the rows of two.
        ranks = (0, 1) if accelerator.num_processes == 1 else (accelerator.process_index,)

        def loss_of(micro, model=model, data=data, ranks=ranks):
            rows = [rows_of(0, rank, 2, 2, micro) for rank in ranks]
            return sum(model(data.inputs[r], data.labels[r])["loss"] for r in rows) / len(rows)

        with accelerator.no_sync(model):
            accelerator.backward(loss_of(0))
        drop(model, optimizer)
        accelerator.backward(loss_of(1))
        total = weights_of_gradients(model)
        optimizer.step()
        results[name] = {"scalars": scalars(optimizer), "gradient": total}
    return results


def weights_of_gradients(model):
    return torch.cat([full(p.grad).flatten() for p in model.parameters()])


def local_sgd():
    """Losses while gradients are local, and what two processes took in."""
    accelerator, model, optimizer = prepared(lr=1e-3)
    loss_of, log = losses_of(accelerator, model), []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for step in range(3):
            loss = loss_of(step)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            log.append([float(loss.detach()), float(optimizer.param_groups[0]["loss_avg"])])
    return torch.tensor(log)


def no_sync():
    """A step on gradients that stayed local, then one on averaged ones."""
    accelerator, model, optimizer = prepared(lr=1e-6)
    loss_of, log = losses_of(accelerator, model), []
    for step in range(2):
        loss = loss_of(step)
        with accelerator.no_sync(model) if step == 0 else contextlib.nullcontext():
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        log.append([float(loss.detach()), float(optimizer.param_groups[0]["loss_avg"])])
    return torch.tensor(log)


def join():
    """Uneven inputs: the message of the refusal."""
    accelerator, model, optimizer = prepared()
    loss_of = losses_of(accelerator, model)
    try:
        with Join([model]):
            for step in range(3 + 2 * accelerator.process_index):
                accelerator.backward(loss_of(step))
                optimizer.step()
                optimizer.zero_grad()
    except ValueError as error:
        return str(error), float(optimizer.param_groups[0]["step"])
    return "nothing was refused", -1.0


def one_of_two(folder):
    """A world of two processes; this process's Accelerator knows of none, and only one process trains."""
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    result = two_steps() if rank == 0 else []
    os.environ["RANK"] = str(rank)
    return result


def two_steps():
    """Two steps of an Accelerator that is alone."""
    accelerator, model, optimizer = prepared()
    assert accelerator.num_processes == 1
    loss_of = losses_of(accelerator, model)
    for step in range(2):
        accelerator.backward(loss_of(step))
        optimizer.step()
        optimizer.zero_grad()
    return scalars(optimizer)


def events():
    """The collectives of a round of two models with a MoMo optimizer each."""
    accelerator = accelerator_for("ddp")
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [MomoAdam(m.parameters(), lr=1e-2) for m in (generator, critic)]
    generator, critic, first, second = accelerator.prepare(generator, critic, *optimizers)
    found, original = [], dist.all_reduce

    def recorded(tensor, *args, async_op=False, **kwargs):
        found.append(f"all_reduce {tensor.numel()} {'async' if async_op else 'waits'}")
        return original(tensor, *args, async_op=async_op, **kwargs)

    dist.all_reduce = recorded
    loss = critic(generator(torch.randn(6, 4)).detach()).square().mean()
    loss.register_hook(lambda grad: found.append("backward"))
    accelerator.backward(loss)
    second.step()
    dist.all_reduce = original
    return found


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
