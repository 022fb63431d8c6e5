"""Whose an output folder is."""

import runpy

import pytest

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.outputs import RunArguments, prepare_output, remove_old_run


pytestmark = pytest.mark.usefixtures("fresh_state")


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
    args = arguments(tmp_path, overwrite_output_dir=True)
    prepare_output(args)
    assert files(tmp_path) == {*USED, *OTHERS}  # the data may not be there
    remove_old_run(args)
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
    with pytest.raises(InputError, match="resume_from_checkpoint=True, but .* holds no checkpoint"):
        prepare_output(arguments(tmp_path, resume_from_checkpoint="True"))
    fill(tmp_path, "results.json")
    args = arguments(tmp_path, resume_from_checkpoint="True", overwrite_output_dir=True)
    prepare_output(args)
    assert args.resume_from_checkpoint is None
    with pytest.raises(InputError, match="'./nothing' is not a folder"):
        prepare_output(arguments(tmp_path, resume_from_checkpoint="./nothing"))
    fill(tmp_path, "checkpoint-3/a")
    with pytest.raises(
        InputError, match=f"is the folder of a run; name a checkpoint in it, such as {tmp_path}/checkpoint-3"
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
    with pytest.raises(InputError, match="resume_from_checkpoint=True, but"):
        main([*options, "--resume_from_checkpoint", "True"])
    typo = "--model" if script == "finetune_text_to_image" else "--dataset"
    with pytest.raises((InputError, OSError), match="no-such-folder"):
        main([*options, typo, str(tmp_path / "no-such-folder"), "--overwrite_output_dir", "True"])
    assert "results.json" in files(tmp_path)
