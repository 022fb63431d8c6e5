"""The transforms of images against torch and PIL."""

import numpy as np
import torch
from PIL import Image

from momo_hf.recipes.images.transforms import ImageTransform


def test_transforms():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    plain = ImageTransform(8)(image)
    expected = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(plain, expected)
    grey = ImageTransform(8, 1, mean=0.1, std=0.3)(image)
    torch.testing.assert_close(grey[0], torch.tensor((np.asarray(image.convert("L")) / 255 - 0.1) / 0.3).float())

    wide = Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8))
    middle = wide.resize((8, 8), Image.Resampling.BICUBIC, box=(5, 0, 15, 10))
    torch.testing.assert_close(ImageTransform(8)(wide), ImageTransform(8)(middle))

    torch.manual_seed(0)
    flip, shift = ImageTransform(8, flip=True), ImageTransform(8, padding=2)
    flipped = [flip(image) for _ in range(100)]
    assert all(torch.equal(x, plain) or torch.equal(x, plain.flip(-1)) for x in flipped)
    assert 20 < sum(torch.equal(x, plain) for x in flipped) < 80
    assert any(torch.equal(shift(image)[:, :-2, :-1], plain[:, 2:, 1:]) for _ in range(200))
    crop = ImageTransform(8, resized_crop=True)
    assert {tuple(crop(wide).shape) for _ in range(20)} == {(3, 8, 8)}
    assert len({crop(wide).sum().item() for _ in range(20)}) > 10
