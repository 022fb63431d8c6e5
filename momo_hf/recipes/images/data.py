"""Image datasets: handwritten digits that come with scikit-learn, idx files (the MNIST format), a folder, the Hub."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.utils import tqdm

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import load_named, local_path
from momo_hf.recipes.images.idx import find_idx, load_idx


HELD_OUT = 0.2
WHITE_16 = 65535
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class NamedImage(Image):
    """An image column of 8 bits a channel, whose pictures are named when they cannot be read."""

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> PIL.Image.Image:
        try:
            return eight_bits(super().decode_example(value, token_per_repo_id))
        except Exception as error:  # PIL raises errors of any kind for damaged pictures
            name = value.get("path") if isinstance(value, dict) else None
            problem = f"the picture cannot be read ({type(error).__name__}: {error}); remove it or save it anew"
            raise InputError(problem, name or "a picture without a file name") from error


def eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """A grey picture of 16 bits as one of 8, which PIL's own conversion would make white; any other as it is.

    Raises:
        ValueError: its values are floating-point numbers or have more than 16 bits, so that white is not known.
    """
    if image.mode[0] not in "IF":
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > WHITE_16:
        raise ValueError("its values are not of 8 or 16 bits")
    return PIL.Image.fromarray(np.round(pixels * (255 / WHITE_16)).astype(np.uint8))


def load_images(
    name: str, image_column: str | None = None, label_column: str | None = None, text_column: str | None = None
) -> DatasetDict:
    """Load images to train on and images to evaluate on.

    Args:
        name: `demo` (1,797 digits of 8x8 pixels, nothing downloaded); a folder with idx files, plain or gzipped; a
            folder of images as `datasets` knows it (`train/LABEL/*.png`, or with a metadata file); or a name on the Hub.
        image_column: default: the first column that holds images.
        label_column: default: the first column that holds classes, if there is one.
        text_column: a column with captions, to keep as `text`.

    Returns:
        `train` and `validation` with the columns `image` (PIL), and where there are such, `label` (a ClassLabel) and
        `text`. Without a validation or test split a fifth is held out: of idx files the last, otherwise a random one.

    Raises:
        InputError: there are no images under this name, a file is damaged, or a column is missing.
    """
    if name == "demo":
        return _digits()
    folder = local_path(name)
    if folder is None:
        return _named(load_named(name, name), name, image_column, label_column, text_column)
    if not folder.is_dir():
        raise InputError("is a file; `dataset` takes the folder that it is in", folder)
    parts = find_idx(folder)
    if parts:
        return load_idx(parts, HELD_OUT)
    _check_names(folder)
    # With patterns of our own: datasets would try 45, and walk the whole folder for each.
    patterns = {
        split: [f"{part}/**" for part in parts if (folder / part).is_dir()] for split, parts in SPLIT_FOLDERS.items()
    }
    patterns = {split: found for split, found in patterns.items() if found} or {"train": ["**"]}
    with tqdm(desc=f"Looking through {folder}", total=1) as bar:
        data = load_named(name, "imagefolder", data_dir=str(folder), data_files=patterns)
        bar.update()
    return _named(data, name, image_column, label_column, text_column)


def _check_names(folder: Path) -> None:
    """Folders whose names differ only in case are one class where files were copied to Windows or macOS, two on Linux."""
    for parent in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        names: dict[str, str] = {}
        for path in sorted(path for path in parent.iterdir() if path.is_dir()):
            other = names.setdefault(path.name.lower(), path.name)
            if other != path.name:
                raise InputError(f"its folders {other!r} and {path.name!r} differ only in case; rename one", parent)


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    # In the order of the file a writer's digits stand together, so a split there would separate the writers.
    order = np.random.default_rng(0).permutation(len(images))
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def part(which: np.ndarray) -> Dataset:
        columns = {"image": list(images[which]), "label": digits.target[which].tolist()}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict(train=part(order[300:]), validation=part(order[:300]))


def _named(data: DatasetDict, name: str, image: str | None, label: str | None, text: str | None) -> DatasetDict:
    if "train" not in data:
        raise InputError(f"dataset={name!r} has no split `train`, only {list(data)}; name its folder `train`.")
    features = data["train"].features
    image = image or next((key for key, kind in features.items() if isinstance(kind, Image)), None)
    label = label or next((key for key, kind in features.items() if isinstance(kind, ClassLabel)), None)
    chosen = {"image": image, "label": label, "text": text}
    for role, key in chosen.items():
        if key not in features and (key is not None or role == "image"):
            raise InputError(f"dataset={name!r} has no column {key!r} for `{role}_column`; it has {list(features)}.")
    chosen = {key: role for role, key in chosen.items() if key is not None}
    data = data.select_columns(list(chosen)).rename_columns({key: role for key, role in chosen.items() if key != role})
    if not isinstance(data["train"].features["image"], Image):
        raise InputError(f"dataset={name!r}: the column {image!r} holds no images; name another with `image_column`.")
    if "label" in data["train"].features and isinstance(data["train"].features["label"], Value):
        data = data.class_encode_column("label")
    if "validation" not in data and "test" in data:
        data["validation"] = data["test"]
    if "validation" not in data:
        if len(data["train"]) < 2:
            raise InputError(f"dataset={name!r} holds one image; one more is needed to hold it out.")
        split = data["train"].train_test_split(HELD_OUT, seed=0)
        data = DatasetDict(train=split["train"], validation=split["test"])
    return DatasetDict(train=data["train"], validation=data["validation"]).cast_column("image", NamedImage())
