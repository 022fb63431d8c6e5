"""The training loop, in plain torch: the same for every optimizer."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import get_scheduler

from momo_hf import MomoOptimizer, mark_tables
from momo_hf.recipes.yardstick.data import Data


MAX_NORM = 1.0
WARMUP = 0.1  # of all steps, where the schedule has one
SCHEDULES = ("constant", "linear", "cosine")  # the last two: a warmup, and a decay to 0


def batches(data: Data, size: int, steps: int, seed: int) -> Iterator[Any]:
    """Batches of the training rows, epoch after epoch in an order that depends on the seed alone.

    Args:
        data: of the task.
        size: rows a batch; what is left of an epoch is dropped.
        steps: how many batches.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(data.train))
    loader = DataLoader(data.train, size, shuffle=True, drop_last=True, collate_fn=data.collate, generator=generator)
    return itertools.islice((batch for _ in itertools.count() for batch in loader), steps)


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: str,
    rows: Iterator[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    steps: int,
) -> None:
    """Train a model, clipped as the Trainer clips by default.

    Args:
        model: left in eval mode, with the weights that the optimizer wants to be evaluated.
        optimizer: of torch, of this package, or schedule-free.
        schedule: one of `SCHEDULES`.
        rows: `steps` batches.
        loss_of: from model and batch to the loss, 0-dim.
        steps: of the schedule.
    """
    scheduler = None
    if schedule != "constant":
        scheduler = get_scheduler(schedule, optimizer, int(WARMUP * steps), steps)
    mark_tables(model, optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    set_mode(model, optimizer, training=True)
    for batch in rows:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        if isinstance(optimizer, MomoOptimizer):
            optimizer.set_clip_factor(MAX_NORM / (norm + 1e-6))
            optimizer.step(loss=loss.detach())
        else:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
    set_mode(model, optimizer, training=False)


def set_mode(model: nn.Module, optimizer: Optimizer, training: bool) -> None:
    """Model and optimizer to training or to evaluation; an optimizer that averages exchanges the weights here."""
    model.train(training)
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        optimizer.train() if training else optimizer.eval()
