"""Pictures as tensors, and classifiers of transformers on them."""

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.transforms import ImageTransform
from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.parts.measures import classifier_measures


def pictures(name: str, size: int, channels: int, classes: range | None = None) -> Data:
    """Pixels in [-1, 1] and labels.

    Args:
        name: as `load_images` takes it.
        size: side of the pictures, in pixels.
        channels: 1 or 3.
        classes: numbers of the classes to take, which are counted from 0 then; default: all.
    """
    transform = ImageTransform(size, channels)

    def tensors(rows: Dataset) -> TensorDataset:
        labels = torch.tensor(rows["label"][:])
        chosen = range(len(rows)) if classes is None else [i for i, label in enumerate(labels) if label in classes]
        pixels = torch.stack([transform(image) for image in rows.select(chosen)["image"]])
        return TensorDataset(pixels, labels[torch.tensor(chosen)] - (classes.start if classes else 0))

    data = load_images(name)
    return Data(tensors(data["train"]), tensors(data["validation"]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of pixels and labels."""
    pixels, labels = batch
    return cross_entropy(model(pixel_values=pixels).logits, labels)


def held_out(model: nn.Module, data: Data) -> dict[str, float]:
    """Cross entropy and accuracy."""
    return classifier_measures(data, lambda batch: (model(pixel_values=batch[0]).logits, batch[1]))
