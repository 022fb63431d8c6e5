"""A run that is killed and goes on, as a user has it: one command starts it and goes on."""

import torch
from safetensors.torch import load_file

from tests.scripts.test_images import QUIET
from tests.soak import losses, run_with_kills


IMAGES = [
    "scripts/run_image_classification.py", "configs/image_classification/demo.yaml", *QUIET, "--eval_strategy", "no",
    "--save_strategy", "steps", "--save_steps", 20, "--logging_steps", 5, "--save_total_limit", 2, "--max_steps", 300,
]  # fmt: skip


def test_a_run_that_is_killed_twice_gives_the_losses_of_one_that_is_not(run_script, tmp_path):
    run_script(*IMAGES, "--output_dir", tmp_path / "once")
    kills = run_with_kills(IMAGES, tmp_path / "killed", every=0.2, kills=2)
    assert len(kills) == 2 and kills[0] > 0
    assert len(losses(tmp_path / "once")) == 60 and losses(tmp_path / "once") == losses(tmp_path / "killed")
    once, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in once.items())
