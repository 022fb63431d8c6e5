"""LoRA on a ViT: pretrained here on five classes of CIFAR-10, adapted to the other five."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers import ViTForImageClassification

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.loop import batches, fit
from momo_hf.recipes.yardstick.parts.images import held_out, loss, pictures
from momo_hf.recipes.yardstick.source import fingerprint_of
from momo_hf.recipes.yardstick.tasks.vit import new_vit


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "LoRA on a ViT"
STEPS, BATCH_SIZE = 1000, 8
DATA = ("cifar10",)

KNOWN, NEW = range(5), range(5, 10)
PRETRAINING_STEPS = 2000


def data(places: Places) -> Data:
    pictures_of = str(places.folder("cifar10"))

    def pretrain(folder: Path) -> None:
        torch.manual_seed(0)
        known, vit = pictures(pictures_of, 32, 3, KNOWN), new_vit(len(KNOWN))
        rows = batches(known, 64, PRETRAINING_STEPS, seed=0)
        fit(vit, AdamW(vit.parameters(), 3e-3, weight_decay=0), "linear", rows, loss, PRETRAINING_STEPS)
        vit.save_pretrained(folder)

    pretrained = places.made(f"vit-{fingerprint_of(__file__)}", pretrain)
    return pictures(pictures_of, 32, 3, NEW)._replace(parts=pretrained)


def model(data: Data) -> PeftModel:
    vit = ViTForImageClassification.from_pretrained(data.parts)
    # The new classes want a head of their own, which is trained as a whole.
    assert isinstance(vit.classifier, nn.Linear)
    vit.classifier.reset_parameters()
    targets = ["q_proj", "v_proj"]
    return get_peft_model(vit, LoraConfig(r=8, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"]))
