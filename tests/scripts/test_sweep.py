"""scripts/sweep_lr.py as a user runs it."""

from pathlib import Path

import yaml


def test_a_sweep_over_two_workers(run_script, tmp_path):
    sweep = yaml.safe_load(Path("configs/sweeps/demo.yaml").read_text())
    sweep["arguments"] |= {"max_steps": 5, "use_cpu": True, "logging_steps": 1}
    sweep["optimizers"] = {name: sweep["optimizers"][name] for name in ("adamw", "momo_adam")}
    sweep |= {"learning_rates": [0.1], "seeds": [0], "output_dir": str(tmp_path / "out")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    shown = run_script("scripts/sweep_lr.py", tmp_path / "sweep.yaml")  # its workers are no forks
    assert "| adamw" in shown.stdout and "| momo_adam" in shown.stdout and "4/4" in shown.stderr
    rows = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 5 and all(",ok," in row for row in rows[1:])
    assert {"sweep.png", "sweep.svg", "sweep.md"} <= {path.name for path in (tmp_path / "out").iterdir()}

    again = run_script("scripts/sweep_lr.py", tmp_path / "sweep.yaml", "--show_only")
    assert again.stdout == shown.stdout
