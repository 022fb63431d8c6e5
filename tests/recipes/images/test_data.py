"""Image datasets from every source."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image
from sklearn.datasets import load_digits

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.transforms import ImageTransform


def test_the_demo_is_scikit_learns_digits():
    data = load_images("demo")
    assert data.num_rows == {"train": 1497, "validation": 300}
    found = sorted((row["label"], np.asarray(row["image"]).tobytes()) for part in data.values() for row in part)
    digits = load_digits()
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert found == sorted((label, image.tobytes()) for label, image in zip(digits.target, expected))


def test_image_folders(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (6, 4), (i, 0, 0)).save(tmp_path / "data" / label / f"{i}.png")
    data = load_images(str(tmp_path / "data"))
    assert data.num_rows == {"train": 8, "validation": 2}
    assert data["train"].features["label"] == ClassLabel(names=["cat", "dog"])
    with pytest.raises(InputError, match="no column 'picture' for `image_column`"):
        load_images(str(tmp_path / "data"), image_column="picture")
    with pytest.raises(InputError, match="'./nowhere' does not exist"):
        load_images("./nowhere")


def pictures(folder, number=5):
    for label in ("cat", "dog"):
        (folder / "train" / label).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / "train" / label / f"{i}.png")


@pytest.mark.parametrize("held_out", ["val", "testing"])
def test_folders_of_splits(tmp_path, held_out):
    pictures(tmp_path)
    for label, number in (("cat", 2), ("dog", 1)):
        (tmp_path / held_out / label).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (4, 4), (i, 9, 0)).save(tmp_path / held_out / label / f"{i}.jpg")
    data = load_images(str(tmp_path))
    assert data.num_rows == {"train": 10, "validation": 3}
    assert data["validation"]["label"][:] == [0, 0, 1]
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(InputError, match="has no split `train`, only"):
        load_images(str(tmp_path))


def test_a_bar_shows_while_a_folder_is_looked_through(tmp_path, capfd):
    pictures(tmp_path)
    load_images(str(tmp_path))
    assert f"Looking through {tmp_path}" in capfd.readouterr().err


def test_captions(tmp_path):
    for i in range(5):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(5)))
    data = load_images(str(tmp_path), text_column="text")
    rows = sorted((row["text"], row["image"].getpixel((0, 0))[0]) for part in data.values() for row in part)
    assert rows == [(f"number {i}", i) for i in range(5)]
    (tmp_path / "metadata.csv").write_text("name,text\n0.png,one\n")
    with pytest.raises(InputError, match="datasets says: ValueError: .*file_name"):
        load_images(str(tmp_path), text_column="text")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "pets")
    assert load_images("~/pets").num_rows == {"train": 8, "validation": 2}
    with pytest.raises(InputError, match=r"'~/cars' does not exist \(looked for .*/cars\)"):
        load_images("~/cars")


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_damaged_pictures_are_named(tmp_path, content):
    pictures(tmp_path)
    path = tmp_path / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:40] if content is None else content)
    data = load_images(str(tmp_path))
    with pytest.raises(InputError, match=r"train/dog/3.png: the picture cannot be read .*; remove it or save it anew"):
        [image for part in data.values() for image in part["image"]]


@pytest.mark.parametrize("number, message", [(0, "datasets says: "), (None, "is a file; `dataset` takes the folder")])
def test_folders_without_pictures(tmp_path, number, message):
    folder = tmp_path / "data"
    folder.write_text("x") if number is None else pictures(folder, number)
    with pytest.raises(InputError, match=message):
        load_images(str(folder))


def test_folders_whose_names_differ_only_in_case(tmp_path):
    pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "cat" / "0.PNG")
    data = load_images(str(tmp_path))
    assert sum(data.num_rows.values()) == 11  # names of pictures may
    (tmp_path / "train" / "Dog").mkdir()
    with pytest.raises(InputError, match="train: its folders 'Dog' and 'dog' differ only in case; rename one"):
        load_images(str(tmp_path))


def read_back(tmp_path, image, name, **options):
    """The picture as the loader gives it, beside a second one."""
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / name, **options)
    Image.new("L", (2, 2)).save(tmp_path / "train" / "z.png")
    data = load_images(str(tmp_path))
    return next(x for part in data.values() for x in part["image"] if x.size == image.size)


def test_cmyk(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0]], [[0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    image = read_back(tmp_path, Image.fromarray(np.kron(inks, np.ones((8, 8, 1), np.uint8)), "CMYK"), "a.tif")
    colours = (ImageTransform(16)(image).permute(1, 2, 0)[4::8, 4::8] + 1) * 127.5
    expected = [[[255, 255, 255], [0, 255, 255]], [[255, 0, 0], [0, 0, 0]]]  # white, cyan, red, black
    torch.testing.assert_close(colours, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("dtype, name", [(np.uint16, "a.png"), (np.uint16, "a.tif"), (np.int32, "a.tif")])
def test_sixteen_bits(tmp_path, dtype, name):
    values = np.array([[0, 257 * 100, 65535]], dtype)
    image = read_back(tmp_path, Image.fromarray(values), name)
    assert np.asarray(image).tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("values", [np.array([[0, 70000, 1]], np.int32), np.array([[0, 0.5, 1]], np.float32)])
def test_values_without_a_white_are_refused(tmp_path, values):
    with pytest.raises(InputError, match="a.tif: the picture cannot be read .*values are not of 8 or 16 bits"):
        read_back(tmp_path, Image.fromarray(values), "a.tif")


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = read_back(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert image.n_frames == 2 and image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
