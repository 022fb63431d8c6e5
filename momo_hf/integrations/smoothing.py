"""The lower bound of a label-smoothed loss."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from momo_hf.integrations.weights import unwrap_optimizer


def label_smoothing_bound(epsilon: float, classes: int) -> float:
    """The smallest cross entropy that transformers' LabelSmoother can give: the entropy of the smoothed target.

    Args:
        epsilon: the smoothing factor, in [0, 1].
        classes: the number V of classes.
    """
    rest = epsilon / classes
    return -sum(count * p * math.log(p) for count, p in ((1, 1 - epsilon + rest), (classes - 1, rest)) if p > 0)


@dataclass
class BoundedLabelSmoother(LabelSmoother):
    """transformers' label smoothing, which says with how many classes it made a loss that is trained on.

    Whether the loss is the smoothed one is known nowhere else: `compute_loss_func`, an overridden `compute_loss` or a
    model that brings its own loss leave `label_smoothing_factor` without effect.
    """

    on_training_loss: Callable[[int], None] = lambda classes: None

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().__call__(model_output, labels, *args, **kwargs)
        if loss.requires_grad:
            logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
            self.on_training_loss(logits.shape[-1])
        return loss


def watch_smoothing(trainer: Trainer) -> None:
    """Give the optimizer the bound of the smoothed loss, unless it has one, as soon as that is what is trained on."""
    known = getattr(trainer, "label_smoother", None)
    if type(known) is LabelSmoother:
        on_training_loss = functools.partial(_set_bound, trainer, known.epsilon)
        trainer.label_smoother = BoundedLabelSmoother(known.epsilon, known.ignore_index, on_training_loss)


def _set_bound(trainer: Trainer, epsilon: float, classes: int) -> None:
    optimizer = unwrap_optimizer(trainer.optimizer)
    if optimizer is not None and optimizer.param_groups[0]["lb"] == 0:
        optimizer.set_lb(label_smoothing_bound(epsilon, classes))
