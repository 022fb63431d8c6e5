"""CIFAR-10 at half its resolution: a ResNet-20, from scratch."""

from momo_hf.recipes.images.models import CifarResNetConfig, CifarResNetForImageClassification
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.images import held_out, loss, pictures


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "ResNet-20, CIFAR-10"
STEPS, BATCH_SIZE = 1000, 16
DATA = ("cifar10",)


def data(places: Places) -> Data:
    return pictures(str(places.folder("cifar10")), 16, 3)


def model(data: Data) -> CifarResNetForImageClassification:
    config = CifarResNetConfig(image_size=16, depth=20, num_labels=10)  # type: ignore[call-arg]  # its base takes the labels
    return CifarResNetForImageClassification(config)
