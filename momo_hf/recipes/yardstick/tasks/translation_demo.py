"""The translation demo's pairs, made of the Unicode CLDR: a Marian model of one layer and width 64."""

from transformers import MarianMTModel

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.measures import loss_per_token as held_out
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss
from momo_hf.recipes.yardstick.parts.translation import read, small_marian, tokenized, tokenizer_of


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "translation demo"
STEPS, BATCH_SIZE = 1000, 8


def data(places: Places) -> Data:
    pairs = read("demo")
    return tokenized(pairs, tokenizer_of(pairs))


def model(data: Data) -> MarianMTModel:
    return small_marian(data.parts)
