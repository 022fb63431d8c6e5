"""MNIST, the 10,000 pictures of its test files, 8,000 to train: an MLP with two hidden layers of 100."""

from momo_hf.recipes.images.models import MLPConfig, MLPForImageClassification
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.images import held_out, loss, pictures


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "MNIST, MLP"
STEPS, BATCH_SIZE = 1000, 128
DATA = ("mnist",)


def data(places: Places) -> Data:
    return pictures(str(places.folder("mnist")), 28, 1)


def model(data: Data) -> MLPForImageClassification:
    config = MLPConfig(image_size=28, num_channels=1, num_labels=10)  # type: ignore[call-arg]  # its base takes the labels
    return MLPForImageClassification(config)
