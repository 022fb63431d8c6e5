"""A GPT-2 of one layer and width 64, from scratch, on English captions."""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.parts.captions import MAX_LENGTH
from momo_hf.recipes.yardstick.parts.captions import to_continue as data
from momo_hf.recipes.yardstick.parts.measures import loss_per_token
from momo_hf.recipes.yardstick.parts.measures import own_loss as loss


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "GPT-2, captions"
STEPS, BATCH_SIZE = 1000, 8
DATA = ("multi30k",)


def new_gpt2(data: Data, layers: int, width: int) -> GPT2LMHeadModel:
    """A small GPT-2 without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=4,
            n_positions=MAX_LENGTH,
            vocab_size=len(data.parts),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=data.parts.eos_token_id,
            eos_token_id=data.parts.eos_token_id,
        )
    )


def model(data: Data) -> GPT2LMHeadModel:
    return new_gpt2(data, layers=1, width=64)


def held_out(model: nn.Module, data: Data) -> dict[str, float]:
    return loss_per_token(model, data, unpredicted=1)
