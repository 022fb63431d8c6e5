"""English captions: to be continued, and to be told apart by what they show."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, PreTrainedTokenizerBase

from momo_hf.recipes.translation.bpe import train_bpe
from momo_hf.recipes.translation.data import load_translation
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.measures import classifier_measures


VOCABULARY = 4000
MAX_LENGTH = 64
MAX_HELD_OUT = 400  # captions to continue

Labelled = list[tuple[str, int]]


def captions(places: Places) -> dict[str, list[str]]:
    """The English side of Multi30k: `train`, and `held_out` of its validation and test set."""
    splits = load_translation(str(places.folder("multi30k")), "de", "en")
    held_out = [text for split in splits if split != "train" for text in splits[split]["target"]]
    return {"train": splits["train"]["target"][:], "held_out": held_out}


def to_continue(places: Places) -> Data:
    """Rows for a causal model."""
    texts = captions(places)
    tokenizer = train_bpe(texts["train"], VOCABULARY, MAX_LENGTH)

    def rows(texts: list[str]) -> list[dict[str, list[int]]]:
        ids = tokenizer(texts, max_length=MAX_LENGTH, truncation=True)["input_ids"]
        return [{"input_ids": row} for row in ids]

    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Data(rows(texts["train"]), rows(texts["held_out"][:MAX_HELD_OUT]), tokenizer, collate)


def to_tell_apart(
    places: Places, label: Callable[[str], tuple[str, int] | None], tokenizer: PreTrainedTokenizerBase | None = None
) -> Data:
    """Rows for a classifier of two classes of equal size.

    Args:
        places: of the task.
        label: from a caption to what of it is shown, and its class, 0 or 1; None leaves it out.
        tokenizer: default: one that is trained on the captions.
    """
    texts = {split: balanced(list(filter(None, map(label, rows)))) for split, rows in captions(places).items()}
    if tokenizer is None:
        tokenizer = train_bpe([text for text, _ in texts["train"]], VOCABULARY, MAX_LENGTH)

    def rows(labelled: Labelled) -> list[dict[str, Any]]:
        ids = tokenizer([text for text, _ in labelled], max_length=MAX_LENGTH, truncation=True)["input_ids"]
        return [{"input_ids": row, "labels": kind} for row, (_, kind) in zip(ids, labelled)]

    collate = DataCollatorWithPadding(tokenizer)
    return Data(rows(texts["train"]), rows(texts["held_out"]), tokenizer, collate)


def balanced(labelled: Labelled) -> Labelled:
    """As many of the one class as of the other, drawn at random where there are more."""
    classes = [[row for row in labelled if row[1] == kind] for kind in (0, 1)]
    draw = random.Random(0)
    return [row for rows in classes for row in draw.sample(rows, min(map(len, classes)))]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of a classifier."""
    return cross_entropy(*logits_and_labels(model, batch))


def held_out(model: nn.Module, data: Data) -> dict[str, float]:
    """Cross entropy and accuracy of a classifier."""
    return classifier_measures(data, lambda batch: logits_and_labels(model, batch))


def logits_and_labels(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return model(**inputs).logits, torch.as_tensor(batch["labels"])
