"""Output folders, and files that are whole or not there."""

import json
import os
import resource
import runpy
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from momo_hf import MomoTrainer
from momo_hf.outputs import RunArguments, WholeCheckpoints, prepare_output, rotate, whole_folder, write_json
from tests.toys import Net, Points


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def arguments(folder, **options):
    defaults = {"optim": "momo_adam", "learning_rate": 0.1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return RunArguments(str(folder), **{**defaults, **options})


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- Whose folder it is ----

USED = (
    "checkpoint-20/a",
    "checkpoint-1500/a",
    "run/events",
    "samples/a.png",
    "results.json",
    "unfinished/checkpoint-1/a",
)
OTHERS = ("checkpoint-best/a", "demo-pipeline/a", "config.json", "log.txt")


def test_a_new_folder_is_made_and_one_with_a_log_is_taken(tmp_path):
    fill(tmp_path / "there", "log.txt", ".gitkeep", "accuracy/cache")
    for folder in (tmp_path / "a" / "b", tmp_path / "there"):
        args = arguments(folder, resume_from_checkpoint="False")
        prepare_output(args)
        assert folder.is_dir() and args.resume_from_checkpoint is None
    assert files(tmp_path / "there") == {"log.txt", ".gitkeep", "accuracy/cache"}


@pytest.mark.parametrize(
    "name", ["checkpoint-5/a", "results.json", "runs/a/events", "run/events", "model.safetensors"]
)
def test_the_folder_of_another_run_is_refused(tmp_path, name):
    fill(tmp_path, name)
    with pytest.raises(
        FileExistsError, match=f"{tmp_path} holds another run .{name.split('/')[0]}.*--overwrite_output"
    ):
        prepare_output(arguments(tmp_path))
    assert files(tmp_path) == {name}


def test_overwriting_removes_the_other_run_and_nothing_else(tmp_path):
    fill(tmp_path, *USED, *OTHERS)
    prepare_output(arguments(tmp_path, overwrite_output_dir=True))
    assert files(tmp_path) == set(OTHERS)


@pytest.mark.parametrize("value", ["True", "true"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_resume_takes_the_last_checkpoint_and_removes_nothing(tmp_path, value, overwrite):
    fill(tmp_path, *USED, *OTHERS)
    args = arguments(tmp_path, resume_from_checkpoint=value, overwrite_output_dir=overwrite)
    prepare_output(args)
    assert args.resume_from_checkpoint == str(tmp_path / "checkpoint-1500")
    assert files(tmp_path) == {*USED, *OTHERS}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint=True, but .* holds no checkpoint"):
        prepare_output(arguments(tmp_path, resume_from_checkpoint="True"))
    fill(tmp_path, "results.json")
    args = arguments(tmp_path, resume_from_checkpoint="True", overwrite_output_dir=True)
    prepare_output(args)
    assert args.resume_from_checkpoint is None and files(tmp_path) == set()
    with pytest.raises(ValueError, match="'./nothing' is not a folder"):
        prepare_output(arguments(tmp_path, resume_from_checkpoint="./nothing"))
    fill(tmp_path, "checkpoint-3/a")
    with pytest.raises(
        ValueError, match=f"is the folder of a run; name a checkpoint in it, such as {tmp_path}/checkpoint-3"
    ):
        prepare_output(arguments(tmp_path / "new", resume_from_checkpoint=str(tmp_path)))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    fill(tmp_path, "file")
    with pytest.raises(OSError, match=f"output_dir={tmp_path}/file/out cannot be written: Not a directory."):
        prepare_output(arguments(tmp_path / "file" / "out"))


SCRIPTS = {
    "finetune_text_to_image": "diffusion/demo_finetune",
    "run_image_classification": "image_classification/demo",
    "run_recommendation": "recommendation/demo",
    "run_translation": "translation/demo",
    "train_diffusion": "diffusion/demo",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_asks_before_it_does_anything(script, tmp_path):
    fill(tmp_path, "results.json")
    main = runpy.run_path(f"scripts/{script}.py", run_name="test")["main"]
    options = [f"configs/{SCRIPTS[script]}.yaml", "--use_cpu", "True", "--output_dir", str(tmp_path)]
    with pytest.raises(FileExistsError, match="holds another run"):
        main(options)
    with pytest.raises(ValueError, match="resume_from_checkpoint=True, but"):
        main([*options, "--resume_from_checkpoint", "True"])
    assert files(tmp_path) == {"results.json"}


# ---- Files that are whole ----


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
    def refuse(constant):
        raise AssertionError(constant)

    path = tmp_path / "new" / "results.json"
    write_json(path, {"auc": float("nan"), "rows": [{"loss": float("inf")}, (1.5, -float("inf"))], "ö": Path("a")})
    found = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert found == {"auc": None, "rows": [{"loss": None}, [1.5, None]], "ö": "a"}
    # What was there stays if the new one cannot be written.
    with pytest.raises(RecursionError):
        write_json(path, (loop := []).append(loop) or loop)
    assert json.loads(path.read_text("utf-8")) == found and list(path.parent.iterdir()) == [path]
