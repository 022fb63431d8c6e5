"""Image datasets: handwritten digits that come with scikit-learn, idx files (the MNIST format), a folder, the Hub."""

import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset


HELD_OUT = 0.2


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
        ValueError: there are no images under this name, or a column is missing.
    """
    folder = Path(name)
    if name == "demo":
        return _digits()
    if folder.is_dir() and (list(folder.glob("*-images-idx3-ubyte*"))):
        return _idx_folder(folder)
    if folder.is_dir():
        data = load_dataset("imagefolder", data_dir=str(folder))
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"The folder dataset={name!r} does not exist.")
    else:
        data = load_dataset(name)
    return _named(data, name, image_column, label_column, text_column)


def _dataset(images: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    # In the order of the file a writer's digits stand together, so a split there would separate the writers.
    order = np.random.default_rng(0).permutation(len(images))
    held_out = order[:300]
    kept = order[300:]
    return DatasetDict(
        train=_dataset(images[kept], digits.target[kept]),
        validation=_dataset(images[held_out], digits.target[held_out]),
    )


def _idx_folder(folder: Path) -> DatasetDict:
    parts = {}
    for prefix, split in (("train", "train"), ("t10k", "validation")):
        found = sorted(folder.glob(f"{prefix}-images-idx3-ubyte*"))
        if found:
            images = read_idx(found[0])
            labels_path = found[0].with_name(found[0].name.replace("images-idx3", "labels-idx1"))
            if not labels_path.is_file():
                raise ValueError(f"{found[0].name} has no labels beside it: {labels_path} is missing.")
            parts[split] = (images, read_idx(labels_path))
    if len(parts) == 1:
        ((images, labels),) = parts.values()
        cut = round(len(images) * (1 - HELD_OUT))
        parts = {"train": (images[:cut], labels[:cut]), "validation": (images[cut:], labels[cut:])}
    return DatasetDict({split: _dataset(*part) for split, part in parts.items()})


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, the format of MNIST.

    Args:
        path: the file, gzipped if its name ends in `.gz`.

    Returns:
        An array of uint8 in the shape that the file says.

    Raises:
        ValueError: it is not such a file.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4]!r}.")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} should hold {shape} bytes after its head, but holds {len(content) - start}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _named(data: DatasetDict, name: str, image: str | None, label: str | None, text: str | None) -> DatasetDict:
    features = data["train"].features
    image = image or next((key for key, kind in features.items() if isinstance(kind, Image)), None)
    label = label or next((key for key, kind in features.items() if isinstance(kind, ClassLabel)), None)
    chosen = {"image": image, "label": label, "text": text}
    for role, key in chosen.items():
        if key not in features and (key is not None or role == "image"):
            raise ValueError(f"dataset={name!r} has no column {key!r} for `{role}_column`; it has {list(features)}.")
    chosen = {key: role for role, key in chosen.items() if key is not None}
    data = data.select_columns(list(chosen)).rename_columns({key: role for key, role in chosen.items() if key != role})
    if "label" in data["train"].features and isinstance(data["train"].features["label"], Value):
        data = data.class_encode_column("label")
    if "validation" not in data and "test" in data:
        data["validation"] = data["test"]
    if "validation" not in data:
        split = data["train"].train_test_split(HELD_OUT, seed=0)
        data = DatasetDict(train=split["train"], validation=split["test"])
    return DatasetDict(train=data["train"], validation=data["validation"])
