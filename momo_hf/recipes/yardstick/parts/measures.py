"""Losses of a batch, and held-out measures, of the kinds of models."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from momo_hf.recipes.yardstick.data import Data


HELD_OUT_BATCH = 100


def held_out_batches(data: Data) -> Iterator[Any]:
    """The held-out rows in their order."""
    return iter(DataLoader(data.held_out, HELD_OUT_BATCH, collate_fn=data.collate))


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that a model of transformers computes of a batch with labels."""
    return model(**batch).loss


def classifier_measures(data: Data, logits_and_labels: Callable[[Any], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean cross entropy, and the share of right answers.

    Args:
        data: with held-out rows.
        logits_and_labels: of a batch: float of shape (batch, classes), and int64 of shape (batch,).
    """
    logits, labels = map(torch.cat, zip(*map(logits_and_labels, held_out_batches(data))))
    right = (logits.argmax(-1) == labels).double().mean()
    return {"loss": cross_entropy(logits.double(), labels).item(), "accuracy": right.item()}


def loss_per_token(model: nn.Module, data: Data, unpredicted: int = 0) -> dict[str, float]:
    """The mean loss over all tokens of the held-out rows.

    Args:
        model: of transformers, whose loss is the mean over the labels that are not -100.
        data: with held-out rows.
        unpredicted: tokens at the start of a row that nothing predicts: 1 for a causal model.
    """
    total, tokens = 0.0, 0
    for batch in held_out_batches(data):
        number = int((batch["labels"][:, unpredicted:] != -100).sum())
        total += number * own_loss(model, batch).item()
        tokens += number
    return {"loss": total / tokens}
