"""Find a learning rate for a task in its first steps, for AdamW or any optimizer that takes Adam's steps.

    python scripts/find_lr.py configs/translation/demo.yaml
    python scripts/find_lr.py configs/diffusion/demo.yaml --per_device_train_batch_size 16
    python scripts/find_lr.py scripts/run_translation.py my.yaml

The task's script takes the steps, with MoMo-Adam in search of its cap, and is left when that is found: 60 steps at most, no
evaluation, nothing saved but the figure and the numbers, in `output_dir` with `-search` at its end.
"""

import argparse
import runpy
import sys
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

from accelerate import PartialState

from momo_hf import MomoAdam
from momo_hf.integrations.names import METHODS
from momo_hf.optim.steps.search import STEPS, Search
from momo_hf.recipes.config_file import read_config
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import InputError, run_main


# The scripts of the folders in configs/.
SCRIPTS = {
    "translation": "run_translation.py",
    "image_classification": "run_image_classification.py",
    "recommendation": "run_recommendation.py",
    "diffusion": "train_diffusion.py",
}


class Found(Exception):
    """Leaves the loop of a script; holds the search."""


class SearchOnly(MomoAdam):
    """MoMo-Adam that takes one step after its search, so that everyone hears of the end, and raises `Found` at the next."""

    def step(self, *args, **kwargs):
        if not self.searching:
            raise Found(self.search)
        return super().step(*args, **kwargs)


def search(script: str | Path, config: str, arguments: list[str], output_dir: str) -> Search:
    """Run the `main` of a script until the search is over."""
    METHODS["momo_adam"] = (SearchOnly, {})
    options = {"optim": "momo_adam", "optim_args": "lr=auto", "max_steps": 2 * STEPS, "output_dir": output_dir}
    options |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    options |= {"overwrite_output_dir": True, "report_to": "none"}
    main = runpy.run_path(str(script), run_name="find_lr")["main"]
    try:
        main([config, *arguments, *(f"--{name}={value}" for name, value in options.items())])
    except Found as found:
        return found.args[0]
    raise InputError(f"{script} ended before the search did, which takes {STEPS} steps at most.")


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    script = argv.pop(0) if argv and argv[0].endswith(".py") else None
    if not argv or argv[0].startswith("-"):
        raise InputError("name a config: find_lr.py [SCRIPT.py] CONFIG.yaml [--any_argument value ...]")
    config, *arguments = argv
    values, _ = read_config(config)
    if script is None:
        folder = Path(config).absolute().parent.name
        if folder not in SCRIPTS:
            raise InputError(
                f"{config} is not in a folder named {', '.join(SCRIPTS)}: name the script before it, such as "
                "scripts/run_translation.py"
            )
        fine_tuning = folder == "diffusion" and "model" in values
        script = Path(__file__).with_name("finetune_text_to_image.py" if fine_tuning else SCRIPTS[folder])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", default=f"{values.get('output_dir', 'trainer_output')}-search")
    known, arguments = parser.parse_known_args(arguments)

    found = search(script, config, arguments, known.output_dir)
    PartialState().destroy_process_group()
    if PartialState().is_main_process:
        print(
            f"Learning rate for AdamW: {found.cap:.2g}, found after {found.steps} steps ({found.reason}); see "
            f"{Path(known.output_dir) / 'search.png'} and {Path(known.output_dir) / 'search.json'}"
        )


if __name__ == "__main__":
    end(run_main(main))
