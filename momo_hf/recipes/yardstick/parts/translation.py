"""Sentence pairs as tokens, and the Marian model that is pretrained on captions, to be fine-tuned."""

from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from torch.optim import AdamW
from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedTokenizerBase

from momo_hf.recipes.translation.bpe import train_bpe
from momo_hf.recipes.translation.data import load_translation
from momo_hf.recipes.translation.marian import new_marian
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.loop import batches, fit
from momo_hf.recipes.yardstick.parts.measures import own_loss
from momo_hf.recipes.yardstick.source import fingerprint_of


VOCABULARY = 4000
MAX_LENGTH = 96
MAX_HELD_OUT = 400  # pairs
PRETRAINING_STEPS = 2000


def read(dataset: str) -> DatasetDict:
    """German and English pairs; `dataset` as `load_translation` takes it."""
    return load_translation(dataset, "de", "en")


def tokenizer_of(*data: DatasetDict) -> PreTrainedTokenizerBase:
    """A joint tokenizer of the training pairs."""
    texts = [text for splits in data for side in ("source", "target") for text in splits["train"][side]]
    return train_bpe(texts, VOCABULARY, MAX_LENGTH)


def tokenized(data: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Rows of tokens; the tokenizer becomes the task's `parts`."""

    def rows(pairs: Dataset) -> list[dict[str, list[int]]]:
        sides = {"text": pairs["source"][:], "text_target": pairs["target"][:]}
        ids = tokenizer(**sides, max_length=MAX_LENGTH, truncation=True)
        return [dict(zip(ids, values)) for values in zip(*ids.values())]

    held_out = data["validation"].select(range(min(MAX_HELD_OUT, len(data["validation"]))))
    return Data(rows(data["train"]), rows(held_out), tokenizer, DataCollatorForSeq2Seq(tokenizer))


def small_marian(tokenizer: PreTrainedTokenizerBase) -> MarianMTModel:
    """One layer each, of width 64."""
    return new_marian(tokenizer, MAX_LENGTH, d_model=64, layers=1, attention_heads=4, ffn_dim=256, dropout=0.0)


def to_fine_tune(places: Places) -> Data:
    """The demo's pairs, and as `parts` the folder of a model that was pretrained on the captions of Multi30k."""
    captions, demo = read(str(places.folder("multi30k"))), read("demo")
    tokenizer = tokenizer_of(captions, demo)

    def pretrain(folder: Path) -> None:
        torch.manual_seed(0)
        data, marian = tokenized(captions, tokenizer), small_marian(tokenizer)
        rows = batches(data, 32, PRETRAINING_STEPS, seed=0)
        fit(marian, AdamW(marian.parameters(), 3e-3, weight_decay=0), "linear", rows, own_loss, PRETRAINING_STEPS)
        marian.save_pretrained(folder)

    folder = places.made(f"translation-{fingerprint_of(__file__)}", pretrain)
    return tokenized(demo, tokenizer)._replace(parts=folder)
