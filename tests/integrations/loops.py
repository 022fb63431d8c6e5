"""The same small problem behind an Accelerator and in a bare loop."""

import torch
from accelerate import Accelerator
from torch import nn

from momo_hf import MomoAdam
from tests.toys import Net, Points


def taken_in(optimizer):
    """The loss of the first step, from its average."""
    return float(optimizer.param_groups[0]["loss_avg"]) / 0.1


def problem(dtype=torch.float64, **options):
    accelerator, data = Accelerator(cpu=True), Points(dtype=dtype)
    model, optimizer = accelerator.prepare(*(made := with_optimizer(dtype, **options)))
    return (
        accelerator,
        model,
        optimizer,
        lambda m=made[0], rows=slice(None): m(data.inputs[rows], data.labels[rows])["loss"],
    )


def with_optimizer(dtype=torch.float64, **options):
    model = Net(dtype=dtype)
    return model, MomoAdam(model.parameters(), **{"lr": 10.0, **options})


def plain_steps(losses_of_step, clip=None, steps=3, **options):
    """Step sizes of a bare loop in which every step is given the loss of its gradients by hand."""
    model, optimizer = with_optimizer(**options)
    taus = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = losses_of_step(model)
        loss.backward()
        if clip:
            optimizer.set_clip_factor(clip / (nn.utils.clip_grad_norm_(model.parameters(), clip) + 1e-6))
        optimizer.step(loss=loss)
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    return taus
