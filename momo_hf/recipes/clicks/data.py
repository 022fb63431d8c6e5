"""Click logs: Criteo display advertising in its published forms, streamed, and a synthetic log of known structure."""

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import load_named, local_path, read_lines


logger = logging.getLogger(__name__)

NUM_DENSE, NUM_TABLES = 13, 26
# Every tenth row is held out, so that a file of unknown length can be streamed.
HELD_OUT_EVERY = 10
# Rows among which a stream is shuffled.
SHUFFLE_BUFFER = 100_000
# A file with more broken rows than this is another file than it should be.
MAX_BROKEN = 100
MAX_NAMED = 10
FORM = "so this is no click log of Criteo's form: label, 13 numbers and 26 categories, between tabs or commas"


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
        InputError: there is no such file, it cannot be read, it has too many broken rows or too few good ones, or an
            argument is out of its range.
    """
    if table_size < 2:
        raise InputError(f"table_size={table_size} leaves no place for a category; it must be 2 or more.")
    if max_eval_samples < 1:
        raise InputError(f"max_eval_samples={max_eval_samples} holds out no row; it must be 1 or more.")
    if name == "demo":
        return synthetic_clicks(table_size)
    path = local_path(name)
    rows: Callable[..., Iterator[dict[str, Any]]] = _read_hub if path is None else _read_file
    options: dict[str, Any] = {"name": name} if path is None else {"path": str(_find_file(path))}
    options["table_size"] = table_size
    validation = []
    for row in tqdm(rows(**options, held_out=True), desc="Held-out rows", total=max_eval_samples):
        validation.append(row)
        if len(validation) == max_eval_samples:
            break
    if not validation:
        raise InputError(
            f"dataset={name!r} has no row to hold out: every {HELD_OUT_EVERY}th is, so {HELD_OUT_EVERY} good rows are "
            "the least."
        )
    columns = {key: np.stack([row[key] for row in validation]) for key in validation[0]}
    train = IterableDataset.from_generator(_training_rows, gen_kwargs={"read": rows, **options})
    return Clicks(train, Dataset.from_dict(columns))


def _training_rows(read: Callable[..., Iterator[dict[str, Any]]], **options: Any) -> Iterator[dict[str, Any]]:
    """The rows that are not held out, with a bar while the buffer fills from which training draws them."""
    with tqdm(desc="Rows to shuffle", total=SHUFFLE_BUFFER, leave=False) as bar:
        for number, row in enumerate(read(**options, held_out=False), start=1):
            if number <= SHUFFLE_BUFFER:
                bar.update()
            if number == SHUFFLE_BUFFER:
                bar.close()
            yield row


# ---- Rows ----


def encode_row(fields: Sequence[str | float | None], table_size: int) -> dict[str, Any]:
    """One row from its 40 fields: label, 13 numbers, 26 categories; an empty field or None is a missing one.

    Numbers x become log(1 + x), with 0 for negative and missing ones, as is usual for these counts.

    Raises:
        BrokenRow: the number of fields, the label or a number is wrong.
    """
    if len(fields) != 1 + NUM_DENSE + NUM_TABLES:
        raise BrokenRow(f"{len(fields)} fields instead of {1 + NUM_DENSE + NUM_TABLES}")
    label = str(fields[0])
    if label not in ("0", "1", "0.0", "1.0"):
        raise BrokenRow(f"the label is {fields[0]!r} instead of 0 or 1")
    try:
        numbers = [0.0 if x is None or x == "" else float(x) for x in fields[1 : 1 + NUM_DENSE]]
    except ValueError as error:
        raise BrokenRow(str(error)) from None
    with np.errstate(over="ignore"):
        dense = np.asarray(numbers, np.float32)
    finite = np.isfinite(dense)
    if not finite.all():
        raise BrokenRow(f"the number {fields[1 + int(finite.argmin())]!r} is not finite in 32 bits")
    categories = fields[1 + NUM_DENSE :]
    codes = [0 if not c else 1 + zlib.crc32(str(c).encode()) % (table_size - 1) for c in categories]
    return {
        "dense": np.log1p(np.maximum(dense, 0)),
        "sparse": np.array(codes, np.int64),
        "labels": float(label),
    }


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    for candidate in (path / "train.txt", path / "train.txt.gz", *sorted(path.glob("*.csv"))):
        if candidate.is_file():
            return candidate
    raise InputError("the folder holds no train.txt, train.txt.gz or .csv; name the file itself", path)


def _read_file(path: str, table_size: int, held_out: bool) -> Iterator[dict[str, Any]]:
    good, broken, problem = 0, 0, ""
    for number, line in enumerate(read_lines(Path(path)), 1):
        if number == 1 and line.lower().startswith("label"):
            continue
        if (number % HELD_OUT_EVERY == 0) != held_out:
            continue
        try:
            row = encode_row(line.split("\t" if "\t" in line else ","), table_size)
        except BrokenRow as error:
            broken, problem = broken + 1, str(error)
            if broken > MAX_BROKEN:
                raise InputError(f"{problem}; more than {MAX_BROKEN} rows are broken, {FORM}", path, number) from None
            if broken <= MAX_NAMED:
                logger.warning(f"{path}, line {number} is left out: {problem}.")
        else:
            good += 1
            yield row
    if broken and not good:
        raise InputError(f"{problem}; all rows are broken, {FORM}", path, number)


def _read_hub(name: str, table_size: int, held_out: bool) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(load_named(name, name, split="train", streaming=True), 1):
        if (number % HELD_OUT_EVERY == 0) == held_out:
            try:
                yield encode_row(list(row.values()), table_size)
            except BrokenRow as error:
                raise InputError(
                    f"dataset={name!r}, row {number}: {error}. Needed: label, 13 numbers, 26 categories, in order."
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
