"""A run that is killed or interrupted and goes on, as a user has it: one command starts it and goes on."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.scripts.test_images import DIFFUSION, QUIET
from tests.soak import losses, run_with_kills


IMAGES = [
    "scripts/run_image_classification.py", "configs/image_classification/demo.yaml", *QUIET, "--eval_strategy", "no",
    "--save_strategy", "steps", "--save_steps", 20, "--logging_steps", 5, "--save_total_limit", 2, "--max_steps", 300,
]  # fmt: skip

# Ctrl-C while torch writes a file of checkpoint-STEP, the file half written.
INTERRUPTED = """
import runpy, signal, sys, torch

class Interrupt:
    def __reduce__(self):
        signal.raise_signal(signal.SIGINT)
        return int, ()

def save(values, path, *args, write=torch.save, **kwargs):
    write([values, Interrupt()] if f"checkpoint-{step}/" in str(path) else values, path, *args, **kwargs)

step, *sys.argv = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
torch.save = save
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def interrupt(run_script, script, step, folder):
    """Interrupt a run in the save at `step`; returns the steps of the checkpoints that are there then."""
    stopped = run_script("-c", INTERRUPTED, step, *script, "--output_dir", folder, check=False)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    name = Path(script[0]).name
    assert stopped.stderr.splitlines()[-1] == f"{name}: interrupted; checkpoints that were made before are whole"
    assert not (folder / "unfinished").exists()
    return {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}


def test_a_run_that_is_interrupted_and_killed_twice_gives_the_losses_of_one_that_is_not(run_script, tmp_path):
    run_script(*IMAGES, "--output_dir", tmp_path / "once")
    assert interrupt(run_script, IMAGES, 60, tmp_path / "killed") == {20, 40}
    kills = run_with_kills(IMAGES, tmp_path / "killed", every=0.2, kills=2)
    assert len(kills) == 2 and kills[0] > 40
    assert len(losses(tmp_path / "once")) == 60 and losses(tmp_path / "once") == losses(tmp_path / "killed")
    once, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in once.items())


def test_an_interrupt_of_the_loop_on_accelerate(run_script, tmp_path):
    assert interrupt(run_script, DIFFUSION, 4, tmp_path / "out") == {2}
