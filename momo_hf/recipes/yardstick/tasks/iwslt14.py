"""IWSLT14, talks from German to English: a Marian model of two layers and width 128."""

from transformers import MarianMTModel

from momo_hf.recipes.translation.marian import new_marian
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.measures import loss_per_token as held_out
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss
from momo_hf.recipes.yardstick.parts.translation import MAX_LENGTH, read, tokenized, tokenizer_of


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "IWSLT14"
STEPS, BATCH_SIZE = 1000, 16
DATA = ("iwslt14",)


def data(places: Places) -> Data:
    pairs = read(str(places.folder("iwslt14")))
    return tokenized(pairs, tokenizer_of(pairs))


def model(data: Data) -> MarianMTModel:
    return new_marian(data.parts, MAX_LENGTH, d_model=128, layers=2, attention_heads=4, ffn_dim=512, dropout=0.1)
