"""idx files, the format of MNIST and EMNIST: images and labels of unsigned bytes."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict, Features, Image

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import read_bytes, stream_to_disk


# `train-images-idx3-ubyte`, `t10k-images.idx3-ubyte.gz`, `emnist-letters-test-images-idx3-ubyte.gz`
IMAGES = re.compile(r"(?P<set>.*-)?(?P<part>train|test|t10k)-images[-.]idx3-ubyte(\.gz)?")


def find_idx(folder: Path) -> dict[str, Path]:
    """The files with images, by split (`train`, `validation`).

    Raises:
        InputError: they are of several sets, or two are for one split.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # a file that was unpacked goes before its .gz
        match = IMAGES.fullmatch(path.name)
        if match:
            found.setdefault(match["set"] or "", {})[match["part"]] = path
    if len(found) > 1 or any({"test", "t10k"} <= parts.keys() for parts in found.values()):
        names = ", ".join(path.name for parts in found.values() for path in parts.values())
        raise InputError(f"holds more than one set of idx files: {names}; give each a folder of its own", folder)
    parts = next(iter(found.values()), {})
    return {"train" if part == "train" else "validation": path for part, path in parts.items()}


def load_idx(parts: dict[str, Path], held_out: float) -> DatasetDict:
    """Read images and their labels, from the file beside them.

    Args:
        parts: files with images by split, from `find_idx`.
        held_out: the share to cut off the end where there is one split only.

    Raises:
        InputError: a file is missing, damaged, or does not belong to the other.
    """
    files = {split: (images, _labels_of(images)) for split, images in parts.items()}
    highest = max(int(read_idx(labels, 1).max(initial=0)) for _, labels in files.values())
    names = [str(label) for label in range(max(10, highest + 1))]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    data = {split: stream_to_disk(idx_rows, features, pair) for split, pair in files.items()}
    if len(data) == 1:
        ((only, whole),) = data.items()
        cut = min(round(len(whole) * (1 - held_out)), len(whole) - 1)
        if cut == 0:
            raise InputError("holds one image; one more is needed to hold it out", parts[only])
        data = {"train": whole.select(range(cut)), "validation": whole.select(range(cut, len(whole)))}
    return DatasetDict(data)


def _labels_of(images: Path) -> Path:
    name = images.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    for labels in (name, name.removesuffix(".gz"), name.removesuffix(".gz") + ".gz"):
        if (images.parent / labels).is_file():
            return images.parent / labels
    raise InputError(f"has no labels beside it: {name} is missing", images)


def idx_rows(files: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Images as arrays of shape (height, width), and labels."""
    images, labels = read_idx(Path(files[0]), 3), read_idx(Path(files[1]), 1)
    if len(images) != len(labels):
        raise InputError(
            f"holds {len(images)} images, but {files[1]} {len(labels)} labels: they do not belong", files[0]
        )
    for image, label in zip(images, labels.tolist()):
        yield {"image": image, "label": label}


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    Args:
        path: the file, gzipped or not.
        dimensions: 3 for images, 1 for labels.

    Returns:
        An array of uint8 in the shape that the file says.

    Raises:
        InputError: it is not such a file, or not whole.
    """
    content = read_bytes(path)
    if content[:4] != bytes([0, 0, 8, dimensions]):
        problem = f"is not an idx file of unsigned bytes in {dimensions} dimensions: it starts with {content[:4]!r}"
        raise InputError(problem, path)
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InputError(f"ends within its head, after {len(content)} of {start} bytes; fetch it again", path)
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) - start != math.prod(shape):
        problem = f"should hold {shape} bytes after its head, but holds {len(content) - start}; fetch it again"
        raise InputError(problem, path)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
