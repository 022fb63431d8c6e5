"""scripts/find_lr.py: it finds what the task's own script finds, and leaves it then."""

import json
import runpy

import pytest

from momo_hf.integrations.names import METHODS
from momo_hf.recipes.errors import InputError


CONFIG = "configs/image_classification/demo.yaml"
QUIET = ["--disable_tqdm", "True", "--use_cpu", "True"]


@pytest.fixture
def find_lr(monkeypatch):
    monkeypatch.setitem(METHODS, "momo_adam", METHODS["momo_adam"])
    return runpy.run_path("scripts/find_lr.py", run_name="test")["main"]


def test_it_finds_the_cap_of_the_search(find_lr, tmp_path, capsys, monkeypatch):
    train = runpy.run_path("scripts/run_image_classification.py", run_name="test")["main"]
    options = ["--optim_args", "lr=auto", "--max_steps", "61", "--report_to", "none"]
    train([CONFIG, *QUIET, *options, "--output_dir", str(tmp_path / "trained")])
    capsys.readouterr()
    find_lr([CONFIG, *QUIET, "--output_dir", str(tmp_path / "found")])
    expected, found = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("trained", "found"))
    assert found == expected and found["cap"] > 0
    assert (
        f"Learning rate for AdamW: {expected['cap']:.2g}, found after {expected['steps']} steps"
        in capsys.readouterr().out
    )
    assert (tmp_path / "found" / "search.png").exists()
    assert not (tmp_path / "found" / "results.json").exists()


SCRIPTS = {
    "translation/demo.yaml": "run_translation.py",
    "recommendation/demo.yaml": "run_recommendation.py",
    "diffusion/demo.yaml": "train_diffusion.py",
    "diffusion/text_to_image_lora.yaml": "finetune_text_to_image.py",
}


@pytest.mark.parametrize("config, script", SCRIPTS.items())
def test_the_script_is_that_of_the_folder(find_lr, config, script, monkeypatch):
    called = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: {"main": lambda argv: called.append((path, argv))})
    with pytest.raises(InputError, match="ended before the search did, which takes 60 steps at most"):
        find_lr([f"configs/{config}", "--seed", "3"])
    ((path, argv),) = called
    assert path.endswith(f"/{script}") and argv[:3] == [f"configs/{config}", "--seed", "3"]
    assert any(word.startswith("--output_dir=outputs/") and word.endswith("-search") for word in argv)
    called.clear()
    with pytest.raises(InputError, match="ended before"):
        find_lr(["mine.py", f"configs/{config}"])
    assert called[0][0] == "mine.py"


def test_a_config_elsewhere_needs_its_script(find_lr, tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: demo")
    with pytest.raises(InputError, match="name the script before it"):
        find_lr([str(tmp_path / "a.yaml")])
    with pytest.raises(InputError, match="name a config"):
        find_lr([])
