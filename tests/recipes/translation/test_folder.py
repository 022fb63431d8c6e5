"""Folders of sentence pairs: every layout they come in, and one error that names file, line and fix for what is wrong."""

import gzip
import json
import re

import pytest

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.translation.data import load_translation


GERMAN, ENGLISH = ["Ein Hund.", "Zwei Katzen.", "Drei."], ["A dog.", "Two cats.", "Three."]


def write(folder, name, lines, compressed=False):
    data = ("\n".join(lines) + "\n").encode()
    path = folder / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(data) if compressed else data)


def columns(split):
    return split["source"], split["target"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "validation, test", [("validation", "test"), ("val", "test_2016_flickr"), ("dev", "test.2014")]
)
def test_parallel_text(tmp_path, compressed, validation, test):
    for split in ("train", validation, test):
        write(tmp_path, f"{split}.de", GERMAN, compressed)
        write(tmp_path, f"{split}.en", ENGLISH, compressed)
    data = load_translation(str(tmp_path), "de", "en")
    assert set(data) == {"train", "validation", "test"}
    assert all(columns(split) == (GERMAN, ENGLISH) for split in data.values())
    assert columns(load_translation(str(tmp_path), "en", "de")["train"]) == (ENGLISH, GERMAN)


def test_lines_that_are_empty_on_one_side_are_dropped(tmp_path):
    write(tmp_path, "train.de", ["Ja.", "", "Nein."])
    write(tmp_path, "train.en", ["Yes.", "Lost.", "No."])
    assert columns(load_translation(str(tmp_path), "de", "en")["train"]) == (["Ja.", "Nein."], ["Yes.", "No."])


@pytest.mark.parametrize("source, target", [("de", "en"), ("en", "de")])
def test_official_iwslt14_download(tmp_path, source, target):
    many = [(f"Satz {i} & mehr.", f"Sentence {i} & more.") for i in range(50)]
    for side, language in enumerate(("de", "en")):
        head = ["<url>http://x</url>", "<keywords>talks</keywords>", "<title>A talk</title>"]
        write(tmp_path, f"train.tags.de-en.{language}", head + [f" {pair[side]} " for pair in many])
        for year, pairs in (("dev2010", many[:3]), ("tst2010", many[3:7])):
            rows = [f'<seg id="{i}"> {pair[side].replace("&", "&amp;")} </seg>' for i, pair in enumerate(pairs)]
            write(
                tmp_path,
                f"IWSLT14.TED.{year}.de-en.{language}.xml",
                ['<?xml version="1.0"?>', "<doc>", *rows, "</doc>"],
            )
    data = load_translation(str(tmp_path), source, target)
    order = 1 if source == "de" else -1
    expected = {"train": [p for i, p in enumerate(many) if i % 23], "validation": many[::23], "test": many[:7]}
    for split, pairs in expected.items():
        assert list(zip(*columns(data[split]))) == [pair[::order] for pair in pairs]


@pytest.mark.parametrize("wrapped", [False, True])
def test_json_lines(tmp_path, wrapped):
    rows = [{"de": d, "en": e} for d, e in zip(GERMAN, ENGLISH)]
    for split in ("train", "dev"):
        write(tmp_path, f"{split}.jsonl", [json.dumps({"translation": r} if wrapped else r) for r in rows])
    data = load_translation(str(tmp_path), "de", "en")
    assert columns(data["train"]) == columns(data["validation"]) == (GERMAN, ENGLISH)


def test_unequal_files_are_named(tmp_path):
    write(tmp_path, "train.de", GERMAN)
    write(tmp_path, "train.en", ENGLISH[:2])
    with pytest.raises(InputError, match=r"train.de 3 and train.en 2"):
        load_translation(str(tmp_path), "de", "en")


def test_unknown_layouts_say_what_was_looked_for(tmp_path):
    write(tmp_path, "corpus.txt", GERMAN)
    with pytest.raises(InputError, match=r"train\.de and train\.en.*train\.tags.*train\.jsonl.*corpus\.txt"):
        load_translation(str(tmp_path), "de", "en")


def test_wrong_paths_say_where_was_looked():
    with pytest.raises(InputError, match=r"'\./no/such/folder' does not exist \(looked for /"):
        load_translation("./no/such/folder", "de", "en")


def test_broken_json_is_named_by_line(tmp_path):
    write(tmp_path, "train.jsonl", [json.dumps({"de": "Ja.", "en": "Yes."}), json.dumps({"de": "Nein."})])
    with pytest.raises(InputError, match="train.jsonl, line 2"):
        load_translation(str(tmp_path), "de", "en")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus", "train.de", GERMAN)
    write(tmp_path / "corpus", "train.en", ENGLISH)
    assert columns(load_translation("~/corpus", "de", "en")["train"]) == (GERMAN, ENGLISH)
    with pytest.raises(InputError, match=re.escape(f"'~/nothing' does not exist (looked for {tmp_path}/nothing)")):
        load_translation("~/nothing", "de", "en")
    with pytest.raises(InputError, match="train.de: is a file; `dataset` takes the folder"):
        load_translation("~/corpus/train.de", "de", "en")


def test_only_line_feeds_end_a_line_and_marks_of_windows_are_no_text(tmp_path):
    (tmp_path / "train.de").write_bytes("\ufeffEin\rHund.\r\nZwei\u2028Katzen.\r\nDrei.".encode())
    write(tmp_path, "train.en", ENGLISH)
    expected = ["Ein\rHund.", "Zwei\u2028Katzen.", "Drei."]
    assert columns(load_translation(str(tmp_path), "de", "en")["train"]) == (expected, ENGLISH)


def test_a_file_that_has_changed_is_read_again(tmp_path):
    for english in (ENGLISH, ENGLISH[::-1]):
        write(tmp_path, "train.de", GERMAN)
        write(tmp_path, "train.en", english)
        assert columns(load_translation(str(tmp_path), "de", "en")["train"]) == (GERMAN, english)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "train.de: the file is empty"),
        (b"\n \n\n", "train.de and .*train.en: no row that is more than blank"),
        (b"Ein Hund.\nZwei K\xe4tzchen.\nDrei.\n", "train.de, line 2: byte 0xe4 at position 7 is not UTF-8.*iconv"),
        ("Ein Hund.\n".encode("utf-16"), "train.de, line 1: byte 0xff at position 1 is not UTF-8"),
        (
            gzip.compress(b"Ein Hund.\n" * 9, mtime=0)[:-12],
            "train.de: the gzip file is damaged or not whole.*fetch it again",
        ),
        (
            gzip.compress(b"Ein Hund.\n" * 9, mtime=0)[:12] + b"\xff" * 20,
            "train.de: the gzip file is damaged or not whole",
        ),
        (None, "train.de and train.en are a pair"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    write(tmp_path, "train.en", ENGLISH)
    if content is not None:
        (tmp_path / "train.de").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_translation(str(tmp_path), "de", "en")


def test_a_name_that_promises_gzip(tmp_path):
    write(tmp_path, "train.en", ENGLISH)
    write(tmp_path, "train.de.gz", GERMAN)
    with pytest.raises(InputError, match="train.de.gz: its name ends in .gz, but it is no gzip file"):
        load_translation(str(tmp_path), "de", "en")


@pytest.mark.parametrize(
    "names, message",
    [
        (["train_2015", "train_2016"], "train_2015, train_2016 all fit the split 'train': keep one"),
        (["train", "dev", "val"], "dev, val all fit the split 'validation'"),
        (["train", "test_2016_flickr", "test_2017_flickr"], "test_2016_flickr, test_2017_flickr all fit .* 'test'"),
    ],
)
def test_files_that_fit_one_split(tmp_path, names, message):
    for name in names:
        write(tmp_path, f"{name}.de", GERMAN)
        write(tmp_path, f"{name}.en", ENGLISH)
    with pytest.raises(InputError, match=message):
        load_translation(str(tmp_path), "de", "en")


def test_the_documented_name_goes_first(tmp_path, caplog):
    for name, german in (("train", GERMAN), ("train.bpe", GERMAN[::-1])):
        write(tmp_path, f"{name}.de", german)
        write(tmp_path, f"{name}.en", ENGLISH)
    assert columns(load_translation(str(tmp_path), "de", "en")["train"])[0] == GERMAN
    assert "train is the split 'train'; train.bpe is not used" in caplog.text
    write(tmp_path, "train.de", GERMAN, compressed=True)
    with pytest.raises(InputError, match="train.de: train.de.gz is there too"):
        load_translation(str(tmp_path), "de", "en")


@pytest.mark.parametrize(
    "broken", ["null", "3", '"text"', "[1]", '{"de": null, "en": "No."}', '{"de": 3, "en": "No."}', "{"]
)
def test_json_lines_that_hold_no_pair(tmp_path, broken):
    good = json.dumps({"de": "Ja.", "en": "Yes."})
    write(tmp_path, "train.jsonl", [good, "", broken])
    with pytest.raises(InputError, match="train.jsonl, line 3: every line must be a JSON object with texts for 'de'"):
        load_translation(str(tmp_path), "de", "en")
    write(tmp_path, "train.jsonl", [good, ""])
    assert columns(load_translation(str(tmp_path), "de", "en")["train"]) == (["Ja."], ["Yes."])
