"""A small sweep, whose task is a script that takes no time."""

import pytest
import yaml


TASK = """
import json, os, time
from pathlib import Path

def main(argv):
    options = dict(a.removeprefix("--").split("=", 1) for a in argv[1:])
    lr, seed, folder = float(options["learning_rate"]), int(options["seed"]), Path(options["output_dir"])
    with open(Path(argv[0]).with_name("runs.txt"), "a") as log:
        log.write(f"{options['optim']} {lr:g} {seed}\\n")
    held = Path(argv[0]).with_name(f"wait-{lr:g}-{seed}")
    while held.exists():
        if not held.read_text():  # once, because a reader may come while it is written
            held.write_text(str(os.getpid()))
        time.sleep(0.05)
    if lr == 10:
        raise RuntimeError("out of memory")
    folder.mkdir(parents=True, exist_ok=True)
    value = float("nan") if lr == 1 else lr + seed
    history = [{"step": i, "loss": 1 / i, "momo/effective_lr": lr} for i in range(1, 500)]
    result = {"metrics": {"value": value, "other": 2 * lr - seed}, "seconds": 1.0, "history": history}
    (folder / "results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def sweep_file(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "task.yaml").write_text("")
    sweep = {
        "script": str(tmp_path / "task.py"),
        "config": str(tmp_path / "task.yaml"),
        "output_dir": str(tmp_path / "out"),
        "metric": "value",
        "optimizers": {"adamw": {"optim": "adamw_torch"}, "momo": {"optim": "momo", "learning_rates": [0.1]}},
        "learning_rates": [0.01, 1, 10],
        "seeds": [0, 1],
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path
