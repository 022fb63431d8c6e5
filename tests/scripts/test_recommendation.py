"""scripts/run_recommendation.py as a user runs it, on synthetic clicks and on a file of Criteo's form."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import log_loss
from transformers import AutoModel

import momo_hf.recipes.clicks.dlrm  # noqa: F401
from tests.scripts.conftest import documented


def test_the_demo_and_a_streamed_file(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # streams put a lock file there
    script = ["scripts/run_recommendation.py", "configs/recommendation/demo.yaml", "--disable_tqdm", "True"]
    script += ["--use_cpu", "True", "--logging_steps", 5]
    demo = tmp_path / "demo"
    shown = run_script(*script, "--output_dir", demo, "--max_steps", 150, cold=True).stdout
    metrics = json.loads((demo / "results.json").read_text())["metrics"]
    assert f"(best reachable {metrics['best_log_loss']:.4f})" in shown
    assert metrics["best_log_loss"] < metrics["eval_log_loss"] and metrics["eval_normalized_entropy"] < 0.95
    assert metrics["eval_auc"] > 0.65
    assert all(Image.open(demo / name).width > 400 for name in ("training.png", "calibration.png"))
    assert f"The model is in {demo}" in shown
    # Loaded as configs/README.md says, it is as good as the run says.
    namespace = {}
    code = documented("load_clicks").replace("outputs/recommendation-demo", str(demo)).replace(" 1000", " 100_000")
    exec(code, namespace)
    expected = log_loss(namespace["rows"]["labels"].numpy(), namespace["probabilities"].double().numpy())
    assert metrics["eval_log_loss"] == pytest.approx(expected, rel=1e-5)

    rng = np.random.default_rng(0)
    rows = ["\t".join(map(str, [0, *rng.integers(0, 9, 13), *["05db9164"] * 26])) for _ in range(200)]
    (tmp_path / "train.txt").write_text("\n".join(rows))
    options = ["--dataset", tmp_path / "train.txt", "--output_dir", tmp_path / "file", "--max_steps", 2]
    run_script(*script, *options, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no")
    # All rows are of one class, so that there is no AUC.
    found = json.loads((tmp_path / "file" / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["metrics"]["eval_auc"] is None and found["metrics"]["eval_log_loss"] > 0
    assert Image.open(tmp_path / "file" / "calibration.png").width > 400
    assert AutoModel.from_pretrained(tmp_path / "file").config.table_size == 100

    result = run_script(*script, *options[:2], "--output_dir", tmp_path / "new", check=False)
    assert result.returncode != 0 and "give --max_steps" in result.stderr
