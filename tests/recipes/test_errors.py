"""What a user can mend is one line and status 2, however it reaches the script; all else keeps its traceback."""

import logging
import sys

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from momo_hf.recipes.errors import InputError, run_main


ERROR = InputError("the file is empty", "train.de", 3)
LINE = "train.py: error: train.de, line 3: the file is empty\n"


def broken():
    raise ERROR
    yield {}


class Rows:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ERROR


def chained():
    raise RuntimeError("generation failed") from ERROR


def wrapped_by_datasets(cache):
    Dataset.from_generator(broken, cache_dir=str(cache))


@pytest.fixture(autouse=True)
def name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])


@pytest.mark.parametrize(
    "main",
    [
        lambda tmp_path: next(broken()),
        lambda tmp_path: chained(),
        wrapped_by_datasets,
        lambda tmp_path: next(iter(DataLoader(Rows(), num_workers=1))),
    ],
    ids=["plain", "chained", "datasets", "worker"],
)
def test_one_line(main, tmp_path, capsys):
    assert run_main(lambda: main(tmp_path)) == 2
    assert capsys.readouterr().err.endswith(LINE)


def test_what_the_system_refuses(tmp_path, capsys):
    assert run_main((tmp_path / "nothing").read_text) == 2
    assert capsys.readouterr().err == (
        f"train.py: error: FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/nothing'\n"
    )


def interrupted():
    raise KeyboardInterrupt


def interrupted_in_a_writer():
    try:
        try:
            interrupted()
        finally:
            raise RuntimeError("inline_container.cc: unexpected pos")  # as torch's writer does
    except RuntimeError as error:
        raise OSError("could not be written") from error


@pytest.mark.parametrize("main", [interrupted, interrupted_in_a_writer])
def test_an_interrupt_is_one_line_and_the_status_of_the_shells(main, capsys):
    assert run_main(main) == 130
    assert capsys.readouterr().err == "train.py: interrupted; checkpoints that were made before are whole\n"


def test_everything_else_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)
    with pytest.raises(ValueError, match="a bug"):
        run_main(lambda: int("a bug"))


def test_the_status_of_the_script_is_kept():
    assert run_main(lambda: None) == 0 and run_main(lambda: 3) == 3


def test_the_traceback_is_there_on_request(caplog):
    with caplog.at_level(logging.DEBUG, "momo_hf.recipes.errors"):
        run_main(lambda: next(broken()))
    assert caplog.records[0].exc_info[1] is ERROR
