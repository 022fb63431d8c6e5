"""A folder of sentence pairs, in any of the layouts they come in, streamed to disk."""

import itertools
import json
import logging
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, DatasetDict, Features, Value

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import read_lines, stream_to_disk


logger = logging.getLogger(__name__)

# fairseq's preparation holds out every 23rd pair, which gives the usual 160,239 / 7,283.
IWSLT_HOLD_OUT = 23
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
COLUMNS = Features({"source": Value("string"), "target": Value("string")})

Rows = Iterator[dict[str, str]]
Found = TypeVar("Found")


def load_folder(folder: Path, source: str, target: str) -> DatasetDict:
    """Read sentence pairs; pairs with an empty side are left out.

    Args:
        folder: holds parallel text, JSON lines or the official IWSLT14 download.
        source: language code of the source side.
        target: language code of the target side.

    Returns:
        The splits that are there, `train` among them, with the columns `source` and `target`.

    Raises:
        InputError: no layout is known, it is not clear which file is meant, or a file is wrong.
    """
    for layout in (_iwslt_download, _json_lines, _parallel_text):
        splits = layout(folder, source, target)
        if "train" in splits:
            return DatasetDict(splits)
    files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise InputError(
        f"no known layout. Looked for train.{source} and train.{target} (or .gz); for "
        f"train.tags.{source}-{target}.{source} (or {target}-{source}) of the official IWSLT14 download; for "
        f"train.jsonl or train.json. The folder holds {files}.",
        folder,
    )


def _pair(source: str, target: str) -> Rows:
    source, target = source.strip(), target.strip()
    if source and target:
        yield {"source": source, "target": target}


def _one_of(split: str, exact: dict[str, Found], others: dict[str, Found], folder: Path) -> Found | None:
    """The one candidate for a split: that of the documented name, or else the only one."""
    found = exact or others
    if len(found) > 1:
        raise InputError(f"{', '.join(found)} all fit the split {split!r}: keep one, or join them", folder)
    if exact and others:
        logger.warning(f"{folder}: {', '.join(exact)} is the split {split!r}; {', '.join(others)} is not used.")
    return next(iter(found.values()), None)


# ---- train.de and train.en ----


def _parallel_text(folder: Path, source: str, target: str) -> dict[str, Dataset]:
    splits = {}
    for split, names in SPLIT_NAMES.items():
        sides = [_side(folder, names, language) for language in (source, target)]
        pairs = {stem: (file, sides[1][stem]) for stem, file in sides[0].items() if stem in sides[1]}
        for stem, file in {**sides[0], **sides[1]}.items():
            if not pairs:
                raise InputError(f"its other side is missing: {stem}.{source} and {stem}.{target} are a pair", file)
        exact = {stem: pair for stem, pair in pairs.items() if stem in names}
        files = _one_of(split, exact, {stem: pair for stem, pair in pairs.items() if stem not in names}, folder)
        if files is not None:
            splits[split] = stream_to_disk(parallel_rows, COLUMNS, files)
    return splits


def _side(folder: Path, names: tuple[str, ...], language: str) -> dict[str, Path]:
    """Files by stem: `train.de` or `train.de.gz`; a set may carry its year, `test_2016_flickr.de`."""
    found: dict[str, Path] = {}
    pattern = re.compile(rf"(({'|'.join(names)})([._-].*)?)\.{re.escape(language)}(\.gz)?")
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.name.startswith("train.tags") or not path.is_file():
            continue
        if match[1] in found:
            raise InputError(f"{path.name} is there too: remove one of them", found[match[1]])
        found[match[1]] = path
    return found


def parallel_rows(files: tuple[str, str]) -> Rows:
    """Pairs of lines of equal number."""
    for texts in _together(files, *(read_lines(Path(file)) for file in files)):
        yield from _pair(*texts)


def _together(files: tuple[str, str], source: Iterator[str], target: Iterator[str]) -> Iterator[tuple[str, str]]:
    for number, (first, second) in enumerate(itertools.zip_longest(source, target), 1):
        if first is None or second is None:
            sides = ((first, source), (second, target))
            counts = [number - 1 if text is None else number + sum(1 for _ in side) for text, side in sides]
            described = " and ".join(f"{Path(file).name} {count}" for file, count in zip(files, counts))
            raise InputError(f"two files of one split must have equally many lines, got {described}", files[0])
        yield first, second


# ---- The official IWSLT14 download ----


def _iwslt_download(folder: Path, source: str, target: str) -> dict[str, Dataset]:
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        files = tuple(folder / f"train.tags.{pair}.{language}" for language in (source, target))
        if not all(file.is_file() for file in files):
            continue
        splits = {
            "train": stream_to_disk(tagged_rows, COLUMNS, files, held_out=False),
            "validation": stream_to_disk(tagged_rows, COLUMNS, files, held_out=True),
        }
        tests: list[Path] = []
        for first in sorted(folder.glob(f"IWSLT14.TED*.{pair}.{source}.xml")):
            second = first.with_name(first.name.replace(f".{source}.xml", f".{target}.xml"))
            if not second.is_file():
                raise InputError(f"its other side is missing: {first.name} and {second.name} are a pair", first)
            tests += [first, second]
        if tests:
            splits["test"] = stream_to_disk(segment_rows, COLUMNS, tuple(tests))
        return splits
    return {}


def tagged_rows(files: tuple[str, str], held_out: bool) -> Rows:
    """Pairs of the lines that are no tags, either every 23rd or all others."""
    sides = [(line for line in read_lines(Path(file)) if not line.lstrip().startswith("<")) for file in files]
    for number, texts in enumerate(_together(files, *sides)):
        if (number % IWSLT_HOLD_OUT == 0) == held_out:
            yield from _pair(*texts)


def segment_rows(files: tuple[str, ...]) -> Rows:
    """Pairs of the segments of XML files, which come in turns: source, target, source, target."""
    for pair in zip(files[::2], files[1::2]):
        for texts in _together(pair, *(_segments(Path(file)) for file in pair)):
            yield from _pair(*texts)


def _segments(file: Path) -> Iterator[str]:
    for match in re.finditer(r"<seg[^>]*>(.*?)</seg>", "\n".join(read_lines(file)), re.DOTALL):
        yield unescape(match[1])


# ---- train.jsonl ----


def _json_lines(folder: Path, source: str, target: str) -> dict[str, Dataset]:
    splits = {}
    for split, names in SPLIT_NAMES.items():
        pattern = re.compile(rf"({'|'.join(names)})\.jsonl?(\.gz)?")
        found = {path.name: path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)}
        file = _one_of(split, found, {}, folder)
        if file is not None:
            splits[split] = stream_to_disk(json_rows, COLUMNS, (file,), source=source, target=target)
    return splits


def json_rows(files: tuple[str], source: str, target: str) -> Rows:
    """Pairs of a file with a JSON object a line: both languages, at its top or under `translation`."""
    for number, line in enumerate(read_lines(Path(files[0])), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        row = row.get("translation", row) if isinstance(row, dict) else row
        found = [row.get(language) if isinstance(row, dict) else None for language in (source, target)]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) < 2:
            raise InputError(
                f"every line must be a JSON object with texts for {source!r} and {target!r} (or such an object under "
                f"'translation'), got {line[:80]!r}",
                files[0],
                number,
            )
        yield from _pair(*texts)
