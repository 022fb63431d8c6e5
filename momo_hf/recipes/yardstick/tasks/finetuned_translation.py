"""Fine-tuning translation: a Marian model that was pretrained here on Multi30k, on the translation demo's pairs."""

from transformers import MarianMTModel

from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.parts.measures import loss_per_token as held_out
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss
from momo_hf.recipes.yardstick.parts.translation import to_fine_tune as data


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "fine-tuned translation"
STEPS, BATCH_SIZE = 1000, 8
DATA = ("multi30k",)


def model(data: Data) -> MarianMTModel:
    return MarianMTModel.from_pretrained(data.parts)
