"""scripts/yardstick.py as a user runs it, on the task that configs/README.md shows."""

import pandas as pd
import pytest

from tests.scripts.conftest import documented


ROWS = """
adamw: {title: AdamW, optimizer: torch.optim:AdamW, learning_rates: [1e-2, 1e-1]}
gone: {optimizer: no_such_package:Adam}
auto: {optimizer: momo_hf:MomoAdam, arguments: {lr: auto, averaging: true}}
"""


def test_an_own_task(run_script, tmp_path):
    (tmp_path / "circle.py").write_text(documented("points in a circle"))
    (tmp_path / "rows.yaml").write_text(ROWS)
    out = tmp_path / "out"
    options = ("--seeds", 0, 1, "--workers", 1, "--output_dir", out)
    command = ("scripts/yardstick.py", "--tasks", tmp_path / "circle.py", "vit", "--rivals", tmp_path / "rows.yaml")
    shown = run_script(*command, *options)  # its worker is no fork
    assert (
        "vit is left out: its data are not there: a folder 'cifar10' in the folder that --data names." in shown.stdout
    )
    assert "gone is left out: the package no_such_package is not installed." in shown.stdout
    runs = pd.read_csv(out / "yardstick.csv")
    assert set(runs["outcome"]) == {"ok"} and set(runs["steps"]) == {300} and set(runs["task"]) == {"circle"}
    assert runs[runs["rival"] == "auto"]["cap"].notna().all()
    means = runs.groupby(["rival", "learning_rate"], dropna=False)["loss"].agg(["mean", "size"])
    best = means[means["size"] == 2].groupby("rival")["mean"].min()
    assert f"| {best['auto'] / best['adamw']:.3f} " in (out / "yardstick.md").read_text("utf-8")
    assert best["adamw"] < 0.3  # it has learnt where the circle is
    assert (out / "yardstick.png").stat().st_size > 1000

    log = (out / "worker-0.log").read_text()
    again = run_script(*command, *options)
    assert again.stdout == shown.stdout and (out / "worker-0.log").read_text() == log  # nothing was left to run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tasks", "digit"), "unknown name 'digit'; did you mean 'digits'?"),
        (("--rivals", "adam"), "unknown name 'adam'; did you mean 'adamw'?"),
        (("--tasks", "vit"), "vit is left out: its data are not there"),
        (("--data", "nowhere"), "--data nowhere is not a folder"),
        (("--steps", 0), "`steps` must be 1 or more, got 0"),
        (("--tasks", "digits", "digits"), "two tasks have the name 'digits'"),
    ],
)
def test_wrong_arguments_are_named(run_script, arguments, message, tmp_path):
    shown = run_script("scripts/yardstick.py", *arguments, "--output_dir", tmp_path / "out", check=False)
    assert shown.returncode == 2 and message in shown.stderr and len(shown.stderr.strip().splitlines()) == 1
