"""Click logs: Criteo display advertising in its published forms, streamed, and a synthetic log of known structure."""

import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset


logger = logging.getLogger(__name__)

NUM_DENSE, NUM_TABLES = 13, 26
# Every tenth row is held out, so that a file of unknown length can be streamed.
HELD_OUT_EVERY = 10
# A file with more broken rows than this is another file than it should be.
MAX_BROKEN = 100


class Clicks(NamedTuple):
    """A click log: rows of `dense` (13 floats), `sparse` (26 numbers below the table size) and `labels` (0 or 1).

    Attributes:
        train: rows to train on; a stream, or all at once.
        validation: held-out rows.
        best_log_loss: the smallest log loss that can be expected on the held-out rows, where it is known.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    best_log_loss: float | None = None


class BrokenRow(ValueError):
    """A row that cannot be read; the message says why."""


def load_clicks(name: str, table_size: int, max_eval_samples: int = 100_000) -> Clicks:
    """Load a click log.

    Args:
        name: `demo` (synthetic, nothing downloaded), a file, a folder that holds `train.txt`, `train.txt.gz` or a `.csv`,
            or a Hub name. Text is tab separated without a header as Criteo publishes it, or comma separated with one.
        table_size: categories are hashed to 1 ... table_size - 1, so that unseen ones have a place; 0 is a missing one.
        max_eval_samples: at most so many held-out rows.

    Raises:
        ValueError: there is no such file, or a file has too many broken rows.
    """
    if name == "demo":
        return synthetic_clicks(table_size)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        rows, options = _read_file, {"path": str(_find_file(Path(name)))}
    else:
        rows, options = _read_hub, {"name": name}
    options["table_size"] = table_size
    validation = []
    for row in rows(**options, held_out=True):
        validation.append(row)
        if len(validation) >= max_eval_samples:
            break
    train = IterableDataset.from_generator(rows, gen_kwargs={**options, "held_out": False})
    return Clicks(train, Dataset.from_list(validation))


# ---- Rows ----


def encode_row(fields: list[str | float | None], table_size: int) -> dict[str, Any]:
    """One row from its 40 fields: label, 13 numbers, 26 categories; an empty field or None is a missing one.

    Numbers x become log(1 + x), with 0 for negative and missing ones, as is usual for these counts.

    Raises:
        BrokenRow: the number of fields, the label or a number is wrong.
    """
    if len(fields) != 1 + NUM_DENSE + NUM_TABLES:
        raise BrokenRow(f"{len(fields)} fields instead of {1 + NUM_DENSE + NUM_TABLES}")
    if str(fields[0]) not in ("0", "1", "0.0", "1.0"):
        raise BrokenRow(f"the label is {fields[0]!r} instead of 0 or 1")
    try:
        numbers = [0.0 if x is None or x == "" else float(x) for x in fields[1 : 1 + NUM_DENSE]]
    except ValueError as error:
        raise BrokenRow(str(error)) from None
    if not np.isfinite(numbers).all():
        raise BrokenRow("a number is not finite")
    categories = fields[1 + NUM_DENSE :]
    return {
        "dense": np.log1p(np.maximum(np.float32(numbers), 0)),
        "sparse": [0 if not c else 1 + zlib.crc32(str(c).encode()) % (table_size - 1) for c in categories],
        "labels": float(fields[0]),
    }


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / "train.txt", path / "train.txt.gz", *sorted(path.glob("*.csv"))] if path.is_dir() else []
    for candidate in found:
        if candidate.is_file():
            return candidate
    raise ValueError(f"dataset={str(path)!r} is neither a file nor a folder with train.txt, train.txt.gz or a .csv.")


def _read_file(path: str, table_size: int, held_out: bool) -> Iterator[dict[str, Any]]:
    broken = 0
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\n")
            if number == 1 and line.startswith("label"):
                continue
            if (number % HELD_OUT_EVERY == 0) != held_out:
                continue
            try:
                yield encode_row(line.split("\t" if "\t" in line else ","), table_size)
            except BrokenRow as error:
                broken += 1
                logger.warning(f"{path}, line {number} is left out: {error}.")
                if broken > MAX_BROKEN:
                    raise ValueError(f"{path} has more than {MAX_BROKEN} broken rows.") from None


def _read_hub(name: str, table_size: int, held_out: bool) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(load_dataset(name, split="train", streaming=True), 1):
        if (number % HELD_OUT_EVERY == 0) == held_out:
            try:
                yield encode_row(list(row.values()), table_size)
            except BrokenRow as error:
                raise ValueError(
                    f"{name}, row {number}: {error}. Needed: label, 13 numbers, 26 categories, in order."
                ) from None


# ---- Synthetic ----


def synthetic_clicks(table_size: int, rows: int = 40_000, held_out: int = 10_000, seed: int = 7) -> Clicks:
    """Clicks whose probabilities are known: effects of numbers, of frequent and rare categories, and of pairs of them.

    Args:
        table_size: categories per feature; they are used with Zipf frequencies.
        rows: to train on.
        held_out: to evaluate on.
        seed: of the structure and of the rows.
    """
    rng = np.random.default_rng(seed)
    total = rows + held_out
    dense = rng.normal(size=(total, NUM_DENSE)).astype(np.float32)
    frequencies = 1 / np.arange(1, table_size)
    sparse = 1 + rng.choice(table_size - 1, size=(total, NUM_TABLES), p=frequencies / frequencies.sum())
    weights = 0.25 * rng.normal(size=NUM_DENSE)
    effects = 0.25 * rng.normal(size=(NUM_TABLES, table_size))
    hidden = rng.normal(size=(NUM_TABLES, table_size, 2))
    columns = np.arange(NUM_TABLES)
    logits = -1.2 + dense @ weights + effects[columns, sparse].sum(1)
    for first, second in ((0, 1), (2, 3), (4, 5)):
        logits += 0.5 * (hidden[first, sparse[:, first]] * hidden[second, sparse[:, second]]).sum(1)
    p = 1 / (1 + np.exp(-logits))
    labels = (rng.random(total) < p).astype(np.float32)
    missing = rng.random(dense.shape) < 0.1
    dense[missing] = 0.0
    best = float(-(p * np.log(p) + (1 - p) * np.log1p(-p))[rows:].mean())

    def part(which: slice) -> Dataset:
        columns = {"dense": dense[which], "sparse": sparse[which], "labels": labels[which]}
        return Dataset.from_dict(columns)

    return Clicks(part(slice(rows)), part(slice(rows, None)), best)
