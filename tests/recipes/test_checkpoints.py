"""Files and checkpoints that are whole or not there."""

import json
import logging
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from momo_hf import MomoTrainer
from momo_hf.recipes.outputs import RunArguments, WholeCheckpoints, rotate, whole_folder, write_json
from tests.processes.start import run
from tests.recipes.test_outputs import OTHERS, USED, arguments, files, fill
from tests.toys import Net, Points


pytestmark = pytest.mark.usefixtures("fresh_state")


def test_rotation_counts_by_age_and_spares_the_best_and_what_is_no_checkpoint(tmp_path):
    def write(name, when):
        fill(tmp_path, f"{name}/a")
        os.utime(tmp_path / name, (when, when))

    write("checkpoint-best", 50)
    write("checkpoint-1500", 100)  # of an earlier run
    for step in range(1, 5):
        write(f"checkpoint-{step}", 1000 + 10 * step)
        rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-2") if step > 1 else None)
        expected = {1: {"1"}, 2: {"2"}, 3: {"2", "3"}, 4: {"2", "4"}}[step]
        assert {path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir()} == {"best", *expected}
    for limit in (None, 0, 5):
        rotate(tmp_path, limit)
    assert len(list(tmp_path.iterdir())) == 3
    rotate(tmp_path / "empty", 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), "kill"])
def test_a_checkpoint_that_breaks_off_leaves_the_one_before(tmp_path, error):
    PartialState(cpu=True)
    fill(tmp_path, "checkpoint-1/a", "checkpoint-2/a")

    def save():
        with whole_folder(tmp_path / "checkpoint-2", saves=True) as folder:
            fill(folder, "b")
            assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
            if error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    if error == "kill":
        child = os.fork()
        if child == 0:
            save()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert files(tmp_path) == {"checkpoint-1/a", "checkpoint-2/a", "unfinished/checkpoint-2/b"}
    else:
        with pytest.raises(type(error)):
            save()
        assert files(tmp_path) == {"checkpoint-1/a", "checkpoint-2/a"}
    with whole_folder(tmp_path / "checkpoint-2", saves=True) as folder:
        fill(folder, "c")
    assert files(tmp_path) == {"checkpoint-1/a", "checkpoint-2/c"}


class ToyTrainer(WholeCheckpoints, MomoTrainer):
    pass


def train(cls, folder, resume=None, net=Net, **options):
    defaults = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1}
    args = arguments(folder, **{**defaults, **options})
    trainer = cls(net(), args, train_dataset=Points(), eval_dataset=Points(seed=3))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("lr", [0.01, 30.0])  # the last checkpoint is the best, or the first
def test_a_trainer_keeps_what_the_trainer_keeps(tmp_path, lr):
    kept = {}
    for cls in (MomoTrainer, ToyTrainer):
        folder = tmp_path / cls.__name__
        evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        train(cls, folder, learning_rate=lr, save_total_limit=1, **evaluation)
        states = {p.name: json.loads((p / "trainer_state.json").read_text()) for p in folder.glob("checkpoint-*")}
        best = {name: Path(state["best_model_checkpoint"]).relative_to(folder) for name, state in states.items()}
        kept[cls] = (files(folder), best)
        assert all((folder / path).is_dir() for path in best.values())
    assert kept[MomoTrainer] == kept[ToyTrainer]


def test_a_trainer_that_breaks_off_in_a_save_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    expected = train(ToyTrainer, tmp_path / "once", max_steps=5).model.state_dict()
    save = torch.save

    def interrupted(values, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise KeyboardInterrupt
        save(values, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(ToyTrainer, tmp_path / "twice", max_steps=5)
    monkeypatch.undo()
    last = get_last_checkpoint(tmp_path / "twice")
    assert last.endswith("checkpoint-2")
    for resume in (last, str(tmp_path / "twice" / "checkpoint-5")):  # and a run that is done does no more
        found = train(ToyTrainer, tmp_path / "twice", resume=resume, max_steps=5)
        assert found.state.global_step == 5
        assert all(torch.equal(weight, expected[name]) for name, weight in found.model.state_dict().items())


def test_a_trainer_overwrites_when_it_starts_and_not_when_it_resumes(tmp_path):
    fill(tmp_path, *USED, *OTHERS)
    train(ToyTrainer, tmp_path, max_steps=2, overwrite_output_dir=True)
    assert {name for name in files(tmp_path) if not name.startswith("checkpoint-2/")} == set(OTHERS)
    last = str(tmp_path / "checkpoint-2")
    train(ToyTrainer, tmp_path, resume=last, max_steps=4, overwrite_output_dir=True)
    assert {"checkpoint-2/trainer_state.json", "checkpoint-4/trainer_state.json"} <= files(tmp_path)


class Tied(Net):
    """Two names of one weight, of which a file holds one."""

    _keys_to_ignore_on_save = None  # the Trainer reads it of any model with missing keys

    def __init__(self):
        super().__init__()
        self.again = self.first


def test_only_weights_that_are_nowhere_in_a_file_are_called_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = ToyTrainer(Tied(), arguments(tmp_path))

    def load(*names):
        state = {name: weight for name, weight in trainer.model.state_dict().items() if name.startswith(names)}
        caplog.clear()
        trainer._issue_warnings_after_load(trainer.model.load_state_dict(state, strict=False))
        return caplog.text

    assert load("first.", "second.") == load("again.", "second.") == ""
    assert "second.bias" in load("first.", "second.weight") and "first" not in caplog.text
    assert "first.weight" in load("second.") and "again.weight" in caplog.text


def refuse(constant):
    raise AssertionError(constant)


class Hopeless(Net):
    def forward(self, inputs, labels):
        return {"loss": super().forward(inputs, labels)["loss"] * float("nan")}


def test_the_state_of_a_trainer_is_json_and_goes_on_where_losses_are_not_numbers(tmp_path):
    trainer = train(ToyTrainer, tmp_path, net=Hopeless, max_steps=4, logging_nan_inf_filter=False)
    trainer.save_state()
    assert math.isnan(trainer.state.log_history[0]["loss"])
    found = sorted(tmp_path.rglob("trainer_state.json"))
    assert [path.parent.name for path in found] == ["checkpoint-2", "checkpoint-4", tmp_path.name]
    for path in found:
        state = json.loads(path.read_text(), parse_constant=refuse)
        assert state["log_history"][0]["loss"] is None and state["global_step"] > 0
    resumed = train(ToyTrainer, tmp_path, resume=str(tmp_path / "checkpoint-2"), net=Hopeless, max_steps=4)
    assert resumed.state.global_step == 4


@pytest.fixture
def small_disk():
    """No file can be written beyond 50,000 bytes, as on a disk that is full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def write_with_python(path):
    path.write_text("a" * 100_000)


def write_with_torch(path):
    torch.save(torch.zeros(100_000), path)


def write_with_safetensors(path):
    save_file({"a": torch.zeros(100_000)}, path)


@pytest.mark.parametrize("write", [write_with_python, write_with_torch, write_with_safetensors])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_good(tmp_path, small_disk, write):
    PartialState(cpu=True)
    fill(tmp_path, "checkpoint-1/a", "checkpoint-2/a")
    with (
        pytest.raises(
            OSError, match=f"^{tmp_path}/checkpoint-2 could not be written .* MB are free there.*go on"
        ) as error,
        whole_folder(tmp_path / "checkpoint-2", saves=True) as folder,
    ):
        write(folder / "b")
    assert "\n" not in str(error.value) and files(tmp_path) == {"checkpoint-1/a", "checkpoint-2/a"}


def test_a_trainer_finds_the_disk_full(tmp_path, small_disk):
    class Wide(Net):
        def __init__(self):
            super().__init__(width=4000)

    with pytest.raises(OSError, match=f"^{tmp_path}/checkpoint-2 could not be written"):
        train(ToyTrainer, tmp_path, net=Wide)
    with pytest.raises(OSError, match=f"^{tmp_path} could not be written"):
        train(ToyTrainer, tmp_path, net=Wide, save_strategy="no").save_model()


def test_json_is_what_any_reader_takes(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"auc": float("nan"), "rows": [{"loss": float("inf")}, (1.5, -float("inf"))], "ö": Path("a")})
    found = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert found == {"auc": None, "rows": [{"loss": None}, [1.5, None]], "ö": "a"}
    # What was there stays if the new one cannot be written.
    with pytest.raises(RecursionError):
        write_json(path, (loop := []).append(loop) or loop)
    assert json.loads(path.read_text("utf-8")) == found and list(path.parent.iterdir()) == [path]


READER = """
import sys, torch, transformers

def read(path):
    try:
        print(torch.load(path, weights_only=False).optim.value)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

assert "momo_hf" not in sys.modules
plain, of_a_run = sys.argv[1:]
read(plain)
sys.modules["momo_hf"] = None  # as where it is not installed
read(of_a_run)
del sys.modules["momo_hf"]
read(of_a_run)
read(plain)
"""


@pytest.mark.slow
def test_training_arguments_are_read_elsewhere_or_the_readme_has_the_error(tmp_path):
    paths = []
    for cls in (TrainingArguments, RunArguments):
        args = cls(tmp_path / cls.__name__, optim="momo_adam", max_steps=1, use_cpu=True, report_to="none")
        ToyTrainer(Net(), args, train_dataset=Points()).save_model()
        paths.append(Path(args.output_dir) / "training_args.bin")
    shown = run("-c", READER, *paths, cold=True)
    assert shown.returncode == 0, shown.stderr
    without_import, without_package, *found = shown.stdout.splitlines()
    assert found == ["momo_adam", "momo_adam"]
    # Python 3.11.2 looks a member up by its name, 3.11.7 by its value.
    by_name, by_value = "AttributeError: MOMO_ADAM", "ValueError: momo_adam is not a valid OptimizerNames"
    assert without_import.startswith((by_name, by_value))
    assert without_package.startswith("ModuleNotFoundError: ") and "momo_hf" in without_package
    readme = Path("configs/README.md").read_text("utf-8")
    assert all(text.split(": ")[1] in readme for text in (by_name, by_value)) and "No module named 'momo_hf'" in readme
