"""Sweeps: the table and its decades, configs, and what becomes of runs that diverge, crash or are interrupted."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import yaml

from momo_hf.figures import plot_sweep
from momo_hf.sweeps import collect, decades, default_lr, finished, load_sweep, summary, work


TASK = """
import json, sys
from pathlib import Path

def main(argv):
    options = dict(a.removeprefix("--").split("=", 1) for a in argv[1:])
    lr, seed, folder = float(options["learning_rate"]), int(options["seed"]), Path(options["output_dir"])
    with open(Path(argv[0]).with_name("runs.txt"), "a") as log:
        log.write(f"{options['optim']} {lr:g} {seed}\\n")
    if lr == 10:
        raise RuntimeError("out of memory")
    folder.mkdir(parents=True)
    value = float("nan") if lr == 1 else lr + seed
    history = [{"step": i, "loss": 1 / i, "momo/effective_lr": lr} for i in range(1, 500)]
    result = {"metrics": {"value": value}, "seconds": 1.0, "history": history}
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


def test_every_run_is_a_result(sweep_file):
    sweep = load_sweep(sweep_file)
    # The optimizer's default joins the grid: 1e-3 for AdamW, 1 for Momo.
    assert sweep.grids == {"adamw": [0.001, 0.01, 1, 10], "momo": [0.1, 1]} and sweep.number_of_runs == 12
    work(sweep, 0)
    runs = collect(sweep)
    assert len(runs) == 12
    outcomes = runs.set_index(["optimizer", "learning_rate", "seed"])["outcome"]
    assert outcomes["adamw", 0.01, 0] == "ok" and outcomes["adamw", 1, 1] == "diverged"
    assert outcomes["adamw", 10, 0] == "crashed: RuntimeError: out of memory"
    assert math.isnan(runs["value"][runs["learning_rate"] == 10].iloc[0])
    assert all(len(history) <= 200 for history in runs["history"])

    table = summary(sweep, runs).set_index("optimizer")
    assert table.loc["adamw", "best value"] == pytest.approx(0.501) and table.loc["adamw", "best lr"] == 0.001
    assert table.loc["adamw", "value at default lr"] == pytest.approx(0.501)
    assert math.isnan(table.loc["momo", "value at default lr"]) and table.loc["momo", "best value"] == pytest.approx(
        0.6
    )
    for path in plot_sweep(sweep, runs):
        assert path.stat().st_size > 1000

    # Nothing is left to do.
    before = (sweep_file.parent / "runs.txt").read_text()
    work(sweep, 1)
    assert (sweep_file.parent / "runs.txt").read_text() == before


def test_an_interrupted_sweep_continues(sweep_file, monkeypatch):
    sweep = load_sweep(sweep_file)
    study = sweep.study("adamw")
    trial = study.ask()  # a run that was killed: it stays "running" for ever
    trial.suggest_float("learning_rate", 1e-20, 1e20, log=True)
    work(sweep, 0)
    assert {name: len(finished(sweep.study(name))) for name in sweep.optimizers} == {"adamw": 8, "momo": 4}
    runs = (sweep_file.parent / "runs.txt").read_text().splitlines()
    assert sorted(runs) == sorted(set(runs)) and len(runs) == 12


def test_decades():
    assert decades([0.001, 0.01, 0.1, 1, 10], [False, True, True, False, True]) == pytest.approx(1)
    assert decades([0.001, 0.01, 0.1, 1], [True] * 4) == pytest.approx(3)


def test_defaults_are_those_of_the_classes():
    assert default_lr({"optim": "adamw_torch"}) == 1e-3 and default_lr({"optim": "momo_adam"}) == 1e-2
    assert default_lr({"optim": "momo_adam_auto"}) == 1.0


def test_the_table_takes_the_mean_over_seeds_and_the_best_of_all(sweep_file):
    sweep = load_sweep(sweep_file, direction="maximize", seeds=[0, 1])
    values = {"adamw": [0.90, 0.95, 0.20, 0.1], "momo": [1.00, 0.97]}
    rows = [
        {"optimizer": name, "learning_rate": lr, "seed": seed, "value": value + (0.01 if seed else -0.01)}
        for name, column in values.items()
        for lr, value in zip(sweep.grids[name], column)
        for seed in (0, 1)
    ]
    table = summary(sweep, pd.DataFrame(rows)).set_index("optimizer")
    assert table.loc["adamw", "best value"] == pytest.approx(0.95)
    assert table.loc["adamw", "decades within 5%"] == 0 and table.loc["adamw", "decades within 10%"] == 1
    assert table.loc["momo", "decades within 5%"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimisers": {}}, "unknown keys \\['optimisers'\\]"),
        ({"direction": "up"}, "`direction` must be .* got 'up'"),
        ({"script": "nothing.py"}, "names nothing.py, which does not exist"),
    ],
)
def test_wrong_sweeps_are_named(sweep_file, change, message):
    sweep_file.write_text(yaml.safe_dump(yaml.safe_load(sweep_file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_sweep(sweep_file)


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_repository_are_read(path):
    sweep = load_sweep(path)
    assert sweep.number_of_runs > 1 and json.dumps(sweep.arguments)
