"""Click logs: every form of Criteo's rows, broken ones, and the synthetic log against what it was made of."""

import gzip
import logging

import numpy as np
import pytest
from scipy.optimize import minimize

from momo_hf.recipes.clicks.data import BrokenRow, encode_row, load_clicks, synthetic_clicks
from momo_hf.recipes.errors import InputError


FIELDS = ["1", "3", "", "-1", *["0"] * 10, "05db9164", "", *["68fd1e64"] * 24]


def test_a_row():
    row = encode_row(FIELDS, 100)
    np.testing.assert_allclose(row["dense"], [np.log(4), 0, 0, *[0] * 10], rtol=1e-6)
    assert row["labels"] == 1.0 and row["sparse"][1] == 0
    assert len(set(row["sparse"][2:])) == 1 and all(0 < c < 100 for c in row["sparse"][2:])
    # A category that was never seen has a place too, and the same one every time.
    unseen = ["0", *[""] * 13, *["never seen"] * 26]
    np.testing.assert_array_equal(encode_row(unseen, 100)["sparse"], encode_row(unseen, 100)["sparse"])
    assert encode_row([0, *[None] * 39], 100)["sparse"].tolist() == [0] * 26


@pytest.mark.parametrize(
    "fields, message",
    [
        (FIELDS[:-1], "39 fields instead of 40"),
        (["2", *FIELDS[1:]], "label is '2'"),
        (["1", "x", *FIELDS[2:]], "could not convert"),
        (["1", "inf", *FIELDS[2:]], "'inf' is not finite"),
        (["1", "1", "1e300", *FIELDS[3:]], "'1e300' is not finite in 32 bits"),
    ],
)
def test_broken_rows(fields, message):
    with pytest.raises(BrokenRow, match=message):
        encode_row(fields, 100)


@pytest.mark.parametrize("form", ["train.txt", "train.txt.gz", "sample.csv"])
def test_files_are_streamed_and_broken_lines_named(tmp_path, form, caplog):
    mark = "," if form.endswith("csv") else "\t"
    lines = [mark.join([str(i % 2), str(i), *FIELDS[2:]]) for i in range(1, 31)]
    lines[6] = "1" + mark + "2"
    if form.endswith("csv"):
        lines.insert(0, mark.join(["label", *[f"c{i}" for i in range(39)]]))
    text = "\n".join(lines) + "\n"
    path = tmp_path / form
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    with caplog.at_level(logging.WARNING):
        clicks = load_clicks(str(tmp_path), 100)
        train = list(clicks.train)
    line = 8 if form.endswith("csv") else 7
    assert [f"line {line} is left out: 2 fields instead of 40" in r.message for r in caplog.records].count(True) == 1
    assert len(clicks.validation) == 3 and len(train) == 26
    first = np.expm1(train[0]["dense"][0])
    np.testing.assert_allclose(first, 1, rtol=1e-6)
    held_out = np.expm1(np.array(clicks.validation["dense"][:])[:, 0])
    np.testing.assert_allclose(held_out, [9, 19, 29] if form.endswith("csv") else [10, 20, 30], rtol=1e-5)
    np.testing.assert_array_equal(list(clicks.train)[3]["sparse"], train[3]["sparse"])


@pytest.mark.parametrize(
    "lines, message",
    [
        (["hello"] * 1010, "train.txt, line 1010: 1 fields instead of 40; more than 100 rows are broken"),
        (["hello"] * 50, "train.txt, line 50: 1 fields instead of 40; all rows are broken"),
        (["\t".join(FIELDS)] * 9, "no row to hold out: every 10th is, so 10 good rows are the least"),
    ],
)
def test_wrong_files_are_named(tmp_path, lines, message, caplog):
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=message):
        load_clicks(str(tmp_path), 100)
    assert len(caplog.records) <= 10


def test_ten_rows_are_enough(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(["\t".join(FIELDS)] * 10))
    clicks = load_clicks(str(tmp_path / "log.txt"), 1000)
    assert len(clicks.validation) == 1 and len(list(clicks.train)) == 9
    (tmp_path / "windows.txt").write_text("\r\n".join(["\t".join(FIELDS)] * 10))
    np.testing.assert_equal(list(load_clicks(str(tmp_path / "windows.txt"), 1000).train), list(clicks.train))
    with pytest.raises(InputError, match="holds no train.txt.*name the file itself"):
        load_clicks(str(tmp_path), 100)


@pytest.mark.parametrize("name", ["demo", "log.txt"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(InputError, match="table_size=1 .* must be 2 or more"):
        load_clicks(name, 1)
    with pytest.raises(InputError, match="max_eval_samples=0 .* must be 1 or more"):
        load_clicks(name, 100, 0)


def test_the_best_log_loss_of_the_demo_is_beyond_a_linear_model():
    clicks = synthetic_clicks(20, rows=4000, held_out=2000)
    assert clicks.best_log_loss == synthetic_clicks(20, rows=4000, held_out=2000).best_log_loss
    columns = clicks.validation.with_format("numpy")[:]
    labels, dense = columns["labels"], columns["dense"]
    rate = labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))

    def loss(w):
        return np.logaddexp(0, -(2 * labels - 1) * (dense @ w[:-1] + w[-1])).mean()

    # Even fitted to the held-out rows themselves, the numbers alone do not reach it.
    linear = minimize(loss, np.zeros(14)).fun
    assert clicks.best_log_loss < linear < entropy


def test_bars_show_while_held_out_rows_and_the_shuffle_buffer_are_read(tmp_path, capfd):
    path = tmp_path / "train.txt"
    path.write_text("".join("\t".join(FIELDS) + "\n" for _ in range(40)))
    rows = list(load_clicks(str(path), 100).train)
    said = capfd.readouterr().err
    assert len(rows) == 36 and "Held-out rows" in said and "Rows to shuffle" in said
