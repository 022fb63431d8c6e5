"""LoRA on translation: a Marian model that was pretrained here on Multi30k, on the translation demo's pairs."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MarianMTModel

from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.parts.measures import loss_per_token as held_out
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss
from momo_hf.recipes.yardstick.parts.translation import to_fine_tune as data


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "LoRA on translation"
STEPS, BATCH_SIZE = 1000, 8
DATA = ("multi30k",)


def model(data: Data) -> PeftModel:
    marian = MarianMTModel.from_pretrained(data.parts)
    return get_peft_model(marian, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
