"""CIFAR-10, 10,000 pictures: a ViT of three layers and width 64, from scratch."""

from transformers import ViTConfig, ViTForImageClassification

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.images import held_out, loss, pictures


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "ViT, CIFAR-10"
STEPS, BATCH_SIZE = 1000, 64
DATA = ("cifar10",)


def new_vit(classes: int) -> ViTForImageClassification:
    """A small ViT for pictures of 32x32."""
    return ViTForImageClassification(
        ViTConfig(  # type: ignore[call-arg]  # its base takes the labels
            image_size=32,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=classes,
        )
    )


def data(places: Places) -> Data:
    return pictures(str(places.folder("cifar10")), 32, 3)


def model(data: Data) -> ViTForImageClassification:
    return new_vit(10)
