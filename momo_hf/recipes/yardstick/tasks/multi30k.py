"""Multi30k, German captions to English: a Marian model of one layer and width 64."""

from transformers import MarianMTModel

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.measures import loss_per_token as held_out
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss
from momo_hf.recipes.yardstick.parts.translation import read, small_marian, tokenized, tokenizer_of


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "Multi30k"
STEPS, BATCH_SIZE = 1000, 8
DATA = ("multi30k",)


def data(places: Places) -> Data:
    pairs = read(str(places.folder("multi30k")))
    return tokenized(pairs, tokenizer_of(pairs))


def model(data: Data) -> MarianMTModel:
    return small_marian(data.parts)
