"""A search for the cap on several processes, saved and taken up again; on the same batches as `workers.train`."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from momo_hf import MomoAdam
from momo_hf.integrations.weights import unwrap_optimizer
from tests.distributed import workers_zero
from tests.distributed.workers import accelerator_for, full, rows_of, train
from tests.distributed.workers_fsdp2 import Calls, OddNet
from tests.toys import Net, Points


STEPS = 75


def matrix(folder, kind):
    """Step sizes and weights with accelerate."""
    return {
        "momo_adam": train(kind, "momo_adam", steps=STEPS, lr="auto"),
        "single": train(kind, "momo_adam", torch.float32, steps=STEPS, lr="auto"),
        "momo": train(kind, "momo", steps=STEPS, lr="auto", accumulation=2, clip=0.5),
        "averaging": train(kind, "momo_adam", steps=STEPS, lr="auto", averaging=True),
    }


def by_hand(mesh=None):
    """The loss given by hand; on the processes of a mesh, or on this one alone."""
    world, rank = (mesh.size(), dist.get_rank()) if mesh else (1, 0)
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        model, data = OddNet(dtype=dtype), Points(dtype=dtype)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if mesh:
            fully_shard(model, mesh=mesh)
        optimizer, sizes, back, collectives = MomoAdam(model.parameters(), lr="auto"), [], None, set()
        for step in range(STEPS):
            rows = rows_of(step, rank, world, 1, 0)
            loss = model(data.inputs[rows], data.labels[rows], step)
            loss.backward()
            loss = loss.detach().double()
            if world > 1:
                dist.all_reduce(loss)
            with (calls := Calls()):
                optimizer.step(loss=loss / world)
            optimizer.zero_grad()
            collectives.add(calls.count)
            sizes.append(float(optimizer.param_groups[0]["effective_lr"]))
            if back is None and optimizer.search.cap is not None:
                back = all(torch.equal(full(p), before[n]) for n, p in model.named_parameters())
        weights = {n: full(p) for n, p in model.named_parameters()}
        found = {"sizes": torch.tensor(sizes), "weights": weights, "back": back, "collectives": list(collectives)}
        results[str(dtype)] = found
    return results


def replicated(folder):
    dist.init_process_group("gloo")
    return by_hand(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def zero(folder):
    return {"log": workers_zero.steps_of(*workers_zero.prepare(1, lr="auto"), steps=STEPS)}


def saved(folder, kind, averaging, resume=""):
    """`save_state` of accelerate and torch.distributed.checkpoint in the middle of a search and after it; or from there."""
    accelerator = accelerator_for(kind)
    model, data = Net(), Points()
    model, optimizer = accelerator.prepare(
        model, MomoAdam(model.parameters(), lr="auto", averaging=averaging == "averaging")
    )
    momo, log, first = unwrap_optimizer(optimizer), [], 0
    if resume:
        how, _, at = resume.rpartition("/")[2].partition("-")
        first = int(at)
        if how == "accelerate":
            accelerator.load_state(resume)
        else:
            weights, state = get_state_dict(model, momo)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=resume)
            set_state_dict(model, momo, model_state_dict=weights, optim_state_dict=state)
    for step in range(first, STEPS):
        if step in (20, 70) and not resume:
            accelerator.save_state(f"{folder}/accelerate-{step}")
            weights, state = get_state_dict(model, momo)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/dcp-{step}")
        rows = rows_of(step, accelerator.process_index, accelerator.num_processes, 1, 0)
        accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
        optimizer.step()
        optimizer.zero_grad()
        log.append([float(momo.param_groups[0][name]) for name in ("effective_lr", "search_cap", "search_total")])
    weights = {n: full(p) for n, p in model.named_parameters()}
    names = sorted({name for entry in momo.state.values() for name in entry})
    return {"log": torch.tensor(log), "weights": weights, "names": names, "steps": momo.search.steps}


def resumed(folder, kind, averaging, *checkpoints):
    return [saved(folder, kind, averaging, checkpoint) for checkpoint in checkpoints]
