"""Sentence pairs for translation: the embedded demo, IWSLT14 or any Hub dataset, or a local folder."""

import gzip
import json
import re
from collections.abc import Iterable
from html import unescape
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from momo_hf.data.cldr import sentence_pairs


DEMO_SIZES = {"train": 12000, "validation": 400, "test": 400}
IWSLT14 = {"path": "bbaaaa/iwslt14-de-en", "name": "de-en", "revision": "refs/convert/parquet"}
# fairseq's preparation holds out every 23rd pair, which gives the usual 160,239 / 7,283.
IWSLT_HOLD_OUT = 23
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

Sides = tuple[list[str], list[str]]


def load_translation(dataset: str, source: str, target: str) -> DatasetDict:
    """Load sentence pairs.

    Args:
        dataset: `demo` (generated from CLDR, German and English), `iwslt14`, a local folder, or the Hub name of a
            dataset with a `translation` column (`org/name`, or `org/name:config`).
        source: language code of the source side, for example `de`.
        target: language code of the target side.

    Returns:
        Splits `train`, `validation` and, where there is one, `test`, with the string columns `source` and `target`.

    Raises:
        FileNotFoundError: the folder is missing, or holds none of the known layouts.
        ValueError: two files have different numbers of lines, or the languages are not in the data.
    """
    if dataset == "demo":
        _check_languages({"de", "en"}, source, target, "the demo")
        pairs = sentence_pairs(DEMO_SIZES)
        return _as_dataset({split: ([p[source] for p in ps], [p[target] for p in ps]) for split, ps in pairs.items()})
    if Path(dataset).is_dir():
        return _as_dataset(_from_folder(Path(dataset), source, target))
    if dataset.startswith((".", "/", "~")) or dataset.endswith("/"):
        raise FileNotFoundError(
            f"`dataset`: the folder {dataset!r} does not exist (looked in {Path(dataset).expanduser().absolute()})."
        )
    if dataset == "iwslt14":
        splits = load_dataset(**IWSLT14)
    else:
        path, _, config = dataset.partition(":")
        splits = load_dataset(path, config or None)
    first = next(iter(splits.values()))
    if "translation" not in first.column_names:
        raise ValueError(f"`dataset`: {dataset!r} has no column `translation`, only {first.column_names}.")
    _check_languages(set(first[0]["translation"]), source, target, dataset)

    def columns(batch: dict[str, list[dict[str, str]]]) -> dict[str, list[str]]:
        return {
            "source": [t[source] for t in batch["translation"]],
            "target": [t[target] for t in batch["translation"]],
        }

    return splits.map(columns, batched=True, remove_columns=first.column_names)


def _check_languages(known: set[str], source: str, target: str, where: str) -> None:
    if source == target or not {source, target} <= known:
        raise ValueError(
            f"`source_lang`={source!r} and `target_lang`={target!r}: {where} has the languages {sorted(known)}."
        )


def _as_dataset(splits: dict[str, Sides]) -> DatasetDict:
    kept = {}
    for split, (sources, targets) in splits.items():
        pairs = [(s.strip(), t.strip()) for s, t in zip(sources, targets) if s.strip() and t.strip()]
        kept[split] = Dataset.from_dict({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]})
    return DatasetDict(kept)


# ---- Local folders ----


def _from_folder(folder: Path, source: str, target: str) -> dict[str, Sides]:
    for layout in (_iwslt_download, _json_lines, _parallel_text):
        splits = layout(folder, source, target)
        if "train" in splits:
            return splits
    files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"`dataset`: no known layout in {folder}. Looked for train.{source} and train.{target} (or .gz); for "
        f"train.tags.{source}-{target}.{source} (or {target}-{source}) of the official IWSLT14 download; for "
        f"train.jsonl or train.json. The folder holds {files}."
    )


def _parallel_text(folder: Path, source: str, target: str) -> dict[str, Sides]:
    splits = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            files = [_find(folder, name, language) for language in (source, target)]
            if all(files):
                splits[split] = _equal(files, [_lines(file) for file in files])
                break
    return splits


def _find(folder: Path, name: str, language: str) -> Path | None:
    """`train.de` or `train.de.gz`; a test set may carry its year, `test_2016_flickr.de`."""
    for pattern in (
        f"{name}.{language}",
        f"{name}.{language}.gz",
        f"{name}[._]*.{language}",
        f"{name}[._]*.{language}.gz",
    ):
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("train.tags"))
        if found:
            return found[0]
    return None


def _lines(file: Path) -> list[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as handle:
        return handle.read().removesuffix("\n").split("\n")


def _equal(files: Iterable[Path], sides: list[list[str]]) -> Sides:
    if len(sides[0]) != len(sides[1]):
        described = " and ".join(f"{file.name} {len(side)}" for file, side in zip(files, sides))
        raise ValueError(f"`dataset`: two files of one split must have equally many lines, got {described}.")
    return sides[0], sides[1]


def _iwslt_download(folder: Path, source: str, target: str) -> dict[str, Sides]:
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        files = [folder / f"train.tags.{pair}.{language}" for language in (source, target)]
        if not all(file.is_file() for file in files):
            continue
        texts = [[line.strip() for line in _lines(file) if not line.lstrip().startswith("<")] for file in files]
        sources, targets = _equal(files, texts)
        held = [i for i in range(len(sources)) if i % IWSLT_HOLD_OUT == 0]
        rest = [i for i in range(len(sources)) if i % IWSLT_HOLD_OUT != 0]
        splits = {
            "train": ([sources[i] for i in rest], [targets[i] for i in rest]),
            "validation": ([sources[i] for i in held], [targets[i] for i in held]),
        }
        tests: list[list[str]] = [[], []]
        for first in sorted(folder.glob(f"IWSLT14.TED*.{pair}.{source}.xml")):
            second = first.with_name(first.name.replace(f".{source}.xml", f".{target}.xml"))
            if not second.is_file():
                raise FileNotFoundError(f"`dataset`: {first.name} is there, but not its other side {second.name}.")
            for side, text in zip(tests, _equal((first, second), [_segments(first), _segments(second)])):
                side.extend(text)
        if tests[0]:
            splits["test"] = (tests[0], tests[1])
        return splits
    return {}


def _segments(file: Path) -> list[str]:
    return [unescape(s.strip()) for s in re.findall(r"<seg[^>]*>(.*?)</seg>", file.read_text("utf-8"), re.DOTALL)]


def _json_lines(folder: Path, source: str, target: str) -> dict[str, Sides]:
    splits = {}
    for split, names in SPLIT_NAMES.items():
        file = next((f for name in names for f in sorted(folder.glob(f"{name}.json*"))), None)
        if file is None:
            continue
        sides: Sides = ([], [])
        for number, line in enumerate(_lines(file), start=1):
            try:
                row = json.loads(line)
                row = row.get("translation", row)
                for side, language in zip(sides, (source, target)):
                    side.append(row[language])
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
                raise ValueError(
                    f"`dataset`: line {number} of {file.name} is not a JSON object with {source!r} and {target!r} "
                    f"(or such an object under 'translation'): {line[:80]!r}"
                ) from None
        splits[split] = sides
    return splits
