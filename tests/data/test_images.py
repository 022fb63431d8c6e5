"""Image datasets from every source, and their transforms against torch and PIL."""

import gzip
import struct

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image
from sklearn.datasets import load_digits

from momo_hf.data.images import load_images, read_idx
from momo_hf.data.transforms import ImageTransform


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_the_demo_is_scikit_learns_digits():
    data = load_images("demo")
    assert data.num_rows == {"train": 1497, "validation": 300}
    found = sorted((row["label"], np.asarray(row["image"]).tobytes()) for part in data.values() for row in part)
    digits = load_digits()
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert found == sorted((label, image.tobytes()) for label, image in zip(digits.target, expected))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folders(tmp_path, packed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 5, 5), dtype=np.uint8)
    labels = np.arange(10, dtype=np.uint8)
    end = ".gz" if packed else ""
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        (tmp_path / f"t10k-{name}-ubyte{end}").write_bytes(gzip.compress(content) if packed else content)
    data = load_images(str(tmp_path))
    # One file alone is cut in its order: 80 % to train, the rest to validate.
    assert data["train"]["label"][:] == list(range(8)) and data["validation"]["label"][:] == [8, 9]
    assert np.array_equal(np.asarray(data["validation"][1]["image"]), images[9])
    for name, array in (("images-idx3", images[:3]), ("labels-idx1", labels[:3])):
        (tmp_path / f"train-{name}-ubyte").write_bytes(idx(array))
    assert load_images(str(tmp_path)).num_rows == {"train": 3, "validation": 10}


def test_wrong_idx_files_are_named(tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(path)
    path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8))[:-1])
    with pytest.raises(ValueError, match=r"should hold \(2, 3, 3\) bytes.*holds 17"):
        read_idx(path)
    path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(ValueError, match="labels-idx1-ubyte is missing"):
        load_images(str(tmp_path))


def test_image_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / "data" / label / f"{i}.png")
    data = load_images(str(tmp_path / "data"))
    assert data.num_rows == {"train": 8, "validation": 2}
    assert data["train"].features["label"] == ClassLabel(names=["cat", "dog"])
    with pytest.raises(ValueError, match="no column 'picture' for `image_column`"):
        load_images(str(tmp_path / "data"), image_column="picture")
    with pytest.raises(ValueError, match="'./nowhere' does not exist"):
        load_images("./nowhere")


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
