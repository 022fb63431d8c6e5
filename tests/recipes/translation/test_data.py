"""Translation data that is generated or comes from the Hub; folders are tested beside."""

import json
import re

import pytest
from babel.dates import format_date
from datasets import DatasetDict
from datasets import load_dataset as hub

from momo_hf.recipes import files
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.translation.cldr import sentence_pairs
from momo_hf.recipes.translation.data import load_translation


GERMAN, ENGLISH = ["Ein Hund.", "Zwei Katzen.", "Drei."], ["A dog.", "Two cats.", "Three."]


def columns(split):
    return split["source"], split["target"]


# ---- The demo ----


def test_demo_splits_share_no_sentence_and_are_seeded():
    sizes = {"train": 2000, "validation": 100, "test": 100}
    splits = sentence_pairs(sizes)
    assert splits == sentence_pairs(sizes) and splits != sentence_pairs(sizes, seed=1)
    for language in ("de", "en"):
        texts = [pair[language] for pairs in splits.values() for pair in pairs]
        assert len(texts) == len(set(texts)) == 2200


def test_demo_sides_say_the_same():
    """Numbers that both languages write alike must agree, and dates are those that babel writes."""
    for pair in sentence_pairs({"train": 500})["train"]:
        years = [re.findall(r"\b(?:19|20)\d\d\b", re.sub(r"\d[.,]\d|[.,:]\d+", "", side)) for side in pair.values()]
        assert years[0] == years[1], pair
    assert format_date(__import__("datetime").date(2026, 3, 3), "full", locale="de") == "Dienstag, 3. März 2026"


def test_demo_loads_in_both_directions():
    there, back = load_translation("demo", "de", "en"), load_translation("demo", "en", "de")
    assert columns(there["test"]) == columns(back["test"])[::-1]
    assert set(there) == {"train", "validation", "test"} and len(there["train"]) > 5000


def test_a_language_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"`target_lang`='fr'.*\['de', 'en'\]"):
        load_translation("demo", "de", "fr")


# ---- The Hub, with its loader replaced by local files of the same shape ----


@pytest.mark.parametrize("name", ["iwslt14", "org/name:de-en"])
def test_hub_datasets(name, tmp_path, monkeypatch):
    asked = []

    def load(path, name=None, revision=None):
        asked.append((path, name, revision))
        rows = [{"translation": {"de": d, "en": e}} for d, e in zip(GERMAN, ENGLISH)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return hub("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(files, "load_dataset", load)
    data = load_translation(name, "en", "de")
    assert isinstance(data, DatasetDict) and columns(data["train"]) == (ENGLISH, GERMAN)
    expected = (
        ("bbaaaa/iwslt14-de-en", "de-en", "refs/convert/parquet") if name == "iwslt14" else ("org/name", "de-en", None)
    )
    assert asked == [expected]


# ---- Tokenizer and metric ----
