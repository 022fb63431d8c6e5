"""Sentence pairs for translation: the embedded demo, IWSLT14 or any Hub dataset, or a local folder."""

from datasets import Dataset, DatasetDict

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import load_named, local_path
from momo_hf.recipes.translation.cldr import sentence_pairs
from momo_hf.recipes.translation.folder import load_folder


DEMO_SIZES = {"train": 12000, "validation": 400, "test": 400}
IWSLT14 = {"path": "bbaaaa/iwslt14-de-en", "name": "de-en", "revision": "refs/convert/parquet"}


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
        InputError: the folder is missing, holds none of the known layouts or a file that cannot be read, two files have
            different numbers of lines, or the languages are not in the data.
    """
    if dataset == "demo":
        _check_languages({"de", "en"}, source, target, "the demo")
        splits = sentence_pairs(DEMO_SIZES)
        sides = {"source": source, "target": target}
        return DatasetDict(
            {
                split: Dataset.from_dict({column: [pair[side] for pair in pairs] for column, side in sides.items()})
                for split, pairs in splits.items()
            }
        )
    folder = local_path(dataset)
    if folder is not None:
        if not folder.is_dir():
            raise InputError("is a file; `dataset` takes the folder that it is in", folder)
        return load_folder(folder, source, target)
    if dataset == "iwslt14":
        splits = load_named(dataset, **IWSLT14)
    else:
        path, _, config = dataset.partition(":")
        splits = load_named(dataset, path, config or None)
    first = next(iter(splits.values()))
    if "translation" not in first.column_names:
        raise InputError(f"dataset={dataset!r} has no column `translation`, only {first.column_names}.")
    _check_languages(set(first[0]["translation"]), source, target, dataset)

    def columns(batch: dict[str, list[dict[str, str]]]) -> dict[str, list[str]]:
        return {
            "source": [t[source] for t in batch["translation"]],
            "target": [t[target] for t in batch["translation"]],
        }

    return splits.map(columns, batched=True, remove_columns=first.column_names)


def _check_languages(known: set[str], source: str, target: str, where: str) -> None:
    if source == target or not {source, target} <= known:
        raise InputError(
            f"`source_lang`={source!r} and `target_lang`={target!r}: {where} has the languages {sorted(known)}."
        )
