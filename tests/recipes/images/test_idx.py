"""idx files under every name they have, and one error that names file and fix for damaged ones."""

import gzip
import struct

import numpy as np
import pytest

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.idx import read_idx


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


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
    with pytest.raises(InputError, match="ubyte: is not an idx file of unsigned bytes in 3 dimensions"):
        read_idx(path, 3)
    path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8))[:-1])
    with pytest.raises(InputError, match=r"should hold \(2, 3, 3\) bytes.*holds 17"):
        read_idx(path, 3)
    path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(InputError, match="labels-idx1-ubyte is missing"):
        load_images(str(tmp_path))


def test_heads_that_are_cut_off(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    for length in range(1, 16):
        path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8))[:length])
        with pytest.raises(InputError, match="train-images-idx3-ubyte: (is not an idx file|ends within its head)"):
            read_idx(path, 3)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="train-images-idx3-ubyte: the file is empty"):
        read_idx(path, 3)


def write_set(folder, start, labels, end="", shape=(3, 3)):
    images = np.full((len(labels), *shape), 7, np.uint8)
    (folder / f"{start}-images-idx3-ubyte{end}").write_bytes(idx(images))
    (folder / f"{start}-labels-idx1-ubyte{end}").write_bytes(idx(np.array(labels, np.uint8)))


def test_labels_of_another_number(tmp_path):
    write_set(tmp_path, "train", [0, 1, 2])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(InputError, match="images-idx3-ubyte: holds 3 images, but .*labels-idx1-ubyte 2 labels"):
        load_images(str(tmp_path))


def test_names_of_emnist(tmp_path):
    write_set(tmp_path, "emnist-letters-train", [1, 26, 3])
    write_set(tmp_path, "emnist-letters-test", [2, 5])
    data = load_images(str(tmp_path))
    assert data["train"]["label"][:] == [1, 26, 3] and data["validation"]["label"][:] == [2, 5]
    assert data["train"].features["label"].names == [str(i) for i in range(27)]
    write_set(tmp_path, "emnist-digits-train", [1, 2])
    with pytest.raises(InputError, match="more than one set of idx files: .*emnist-digits-train.*folder of its own"):
        load_images(str(tmp_path))


def test_names_with_a_dot(tmp_path):
    write_set(tmp_path, "train", list(range(5)))
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert load_images(str(tmp_path)).num_rows == {"train": 4, "validation": 1}


def test_two_sets_to_evaluate_on_and_too_few_images(tmp_path):
    write_set(tmp_path, "test", [1])
    with pytest.raises(InputError, match="test-images-idx3-ubyte: holds one image; one more is needed"):
        load_images(str(tmp_path))
    write_set(tmp_path, "test", [1, 2])
    assert load_images(str(tmp_path)).num_rows == {"train": 1, "validation": 1}
    write_set(tmp_path, "t10k", [1, 2])
    with pytest.raises(InputError, match="more than one set of idx files: test-images.*, t10k-images"):
        load_images(str(tmp_path))
