"""What worker processes do to see over which processes losses are averaged."""

import contextlib
import os

import torch
import torch.distributed as dist
from accelerate.local_sgd import LocalSGD
from torch import nn
from torch.distributed.algorithms.join import Join

from momo_hf import MomoAdam
from tests.distributed.workers import accelerator_for, full, rows_of
from tests.toys import Net, Points


def suite(folder):
    """Everything that one start of the processes can show."""
    several = int(os.environ["WORLD_SIZE"]) > 1
    kinds = ("ddp", "fsdp2") if several else ("ddp",)
    results = {f"closure {clip} {parts}": closures(clip, parts) for clip in (0.0, 0.1) for parts in (1, 2)}
    results["bare closure"] = closures(0.0, 1, bare=True)
    for kind in kinds:
        results[f"by hand {kind}"] = by_hand(kind)
        results[f"thrown away {kind}"] = thrown_away(kind)
        results[f"clipped micro-batches {kind}"] = clipped_micro_batches(kind)
        results[f"dropped {kind}"] = dropped(kind)
    if not several:
        results["one of one"] = two_steps()
    else:
        for case in (two_models, local_sgd, no_sync, divided, events, join):
            results[case.__name__] = case()
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


def closures(clip, accumulation, bare=False):
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
                    loss.backward() if bare else accelerator.backward(loss)
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


def thrown_away(kind):
    """A batch whose gradients are averaged, found unfit, and zeroed in place; then one that is used."""
    accelerator, model, optimizer = prepared(kind)
    loss_of = losses_of(accelerator, model)
    accelerator.backward(loss_of(0) * float("nan"))
    model.zero_grad(set_to_none=False)
    accelerator.backward(loss_of(1))
    optimizer.step()
    return scalars(optimizer)


def clipped_micro_batches(kind):
    """The loss of two micro-batches that are clipped one by one, from what the clips return."""
    accelerator, model, optimizer = prepared(kind, gradient_accumulation_steps=2)
    loss_of, right = losses_of(accelerator, model), 0.0
    for micro in range(2):
        with accelerator.accumulate(model):
            loss = loss_of(0, 2, micro)
            accelerator.backward(loss)
            right = right + loss.detach() / 2
            if accelerator.sync_gradients:
                dist.all_reduce(right) if dist.is_initialized() else None
                right = right / accelerator.num_processes
            if any(p.grad is not None for p in model.parameters()):  # FSDP2 has none before the last micro-batch
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                right = right * (0.1 / (full(norm) + 1e-6)).clamp(max=1)
            optimizer.step()
            optimizer.zero_grad()
    return {"found": float(optimizer.param_groups[0]["loss_avg"]) / 0.1, "right": float(right)}


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
        gradient = gradients(model)
        optimizer.step()
        results[name] = {"scalars": scalars(optimizer), "gradient": gradient}
    return results


def gradients(model):
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
        with accelerator.no_sync(model) if step == 0 else contextlib.nullcontext():
            loss = loss_of(step)
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        log.append([float(loss.detach()), float(optimizer.param_groups[0]["loss_avg"])])
    return torch.tensor(log)


def divided():
    """Only the forward pass, or only the backward pass, under `no_sync`: DDP decides in the forward pass; and a backward pass that
    accelerate has average all the same.
    """
    results = {}
    for where in ("forward", "backward", "triggered"):
        accelerator, model, optimizer = prepared(lr=1e-6)
        with accelerator.no_sync(model) if where != "backward" else contextlib.nullcontext():
            loss = losses_of(accelerator, model)(0)
        around = {"forward": contextlib.nullcontext, "backward": accelerator.no_sync}
        with around.get(where, accelerator.trigger_sync_in_backward)(*(() if where == "forward" else (model,))):
            accelerator.backward(loss)
        gradient = gradients(model)
        optimizer.step()
        results[where] = {
            "loss": float(loss.detach()),
            "found": float(optimizer.param_groups[0]["loss_avg"]) / 0.1,
            "gradient": gradient,
        }
    return results


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
