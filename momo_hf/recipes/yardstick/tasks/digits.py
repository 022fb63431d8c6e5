"""Handwritten digits of 8x8 pixels, which come with scikit-learn: an MLP with two hidden layers of 100."""

from momo_hf.recipes.images.models import MLPConfig, MLPForImageClassification
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.images import held_out, loss, pictures


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "digits, MLP"
STEPS, BATCH_SIZE = 1000, 64


def data(places: Places) -> Data:
    return pictures("demo", 8, 1)


def model(data: Data) -> MLPForImageClassification:
    config = MLPConfig(image_size=8, num_channels=1, num_labels=10)  # type: ignore[call-arg]  # its base takes the labels
    return MLPForImageClassification(config)
