"""A BERT of two layers and width 64, from scratch, finds captions of a street."""

import re

from transformers import BertConfig, BertForSequenceClassification

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.captions import MAX_LENGTH, held_out, loss, to_tell_apart


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "BERT, captions"
STEPS, BATCH_SIZE = 1000, 16
DATA = ("multi30k",)
BY_ACCURACY = True  # a good model has a loss of 1e-3 and less


def has_street(caption: str) -> tuple[str, int]:
    return caption, int(re.search(r"\bstreets?\b", caption.lower()) is not None)


def data(places: Places) -> Data:
    return to_tell_apart(places, has_street)


def model(data: Data) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(  # type: ignore[call-arg]  # its base takes the labels
            vocab_size=len(data.parts),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=data.parts.pad_token_id,
            num_labels=2,
        )
    )
