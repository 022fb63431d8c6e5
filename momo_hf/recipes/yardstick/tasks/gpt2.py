"""A GPT-2 of four layers and width 128, from scratch, on English captions."""

from transformers import GPT2LMHeadModel

from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.tasks.gpt2_captions import data, held_out, loss, new_gpt2


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "GPT-2 of four layers, captions"
STEPS, BATCH_SIZE = 1000, 16
DATA = ("multi30k",)


def model(data: Data) -> GPT2LMHeadModel:
    return new_gpt2(data, layers=4, width=128)
