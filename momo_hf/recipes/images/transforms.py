"""From PIL images to tensors, with the usual augmentations, by PIL, NumPy and torch alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ImageTransform:
    """Resize, augment and normalise an image. Random numbers come from torch's global generator.

    Args:
        size: side of the result, in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: subtracted from values in [0, 1]; one number, or one per channel.
        std: divided by afterwards; the defaults give values in [-1, 1].
        flip: mirror every second image.
        padding: pad by so many pixels and cut out a random window (the CIFAR augmentation).
        resized_crop: cut out a random window of 8 to 100 % of the area (the ImageNet augmentation) instead of the middle.
    """

    size: int
    channels: int = 3
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    flip: bool = False
    padding: int = 0
    resized_crop: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image as float32 of shape (channels, size, size)."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        image = self._random_window(image) if self.resized_crop else self._middle(image)
        pixels = np.asarray(image, np.float32).reshape(self.size, self.size, self.channels) / 255
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.padding:
            tensor = torch.nn.functional.pad(tensor, [self.padding] * 4, value=float(tensor.min()))
            top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
            tensor = tensor[:, top : top + self.size, left : left + self.size]
        if self.flip and torch.rand(()) < 0.5:
            tensor = tensor.flip(-1)
        return tensor.contiguous()

    def _middle(self, image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def _random_window(self, image: Image.Image) -> Image.Image:
        for _ in range(10):
            share, ratio = torch.empty(2).uniform_(0, 1).tolist()
            area = image.width * image.height * (0.08 + 0.92 * share)
            ratio = (3 / 4) * (16 / 9) ** ratio
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                left = int(torch.randint(image.width - width + 1, ()))
                top = int(torch.randint(image.height - height + 1, ()))
                box = (left, top, left + width, top + height)
                return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return self._middle(image)

    def rows(self, **columns: str) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
        """A function for `Dataset.with_transform` that turns the column `image` into tensors.

        Args:
            columns: new name = old name of columns to keep as they are.

        Returns:
            A function from a batch of rows to the same with `pixel_values`.
        """

        def convert(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            kept = {new: rows[old] for new, old in columns.items()}
            return {"pixel_values": [self(image) for image in rows["image"]], **kept}

        return convert
