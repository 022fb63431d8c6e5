"""Every file in configs/accelerate starts the translation script through `accelerate launch`, as far as a CPU can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import ROOT, environment_for, free_port


CONFIGS = sorted(path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml"))
TINY = [
    "--max_train_samples", 64, "--max_eval_samples", 2, "--per_device_train_batch_size", 8, "--vocab_size", 200,
    "--d_model", 16, "--layers", 1, "--ffn_dim", 16, "--attention_heads", 2, "--generation_max_length", 4,
    "--max_length", 48, "--logging_steps", 1, "--disable_tqdm", "True", "--max_steps", 2, "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "False", "--report_to", "none", "--warmup_steps", 0,
]  # fmt: skip


def test_every_config_is_here():
    assert CONFIGS == ["bf16", "ddp", "fp16", "fsdp2", "hsdp", "single", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_launch(name, tmp_path):
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
    sharded = config["distributed_type"] in ("FSDP", "DEEPSPEED")
    environment = environment_for(ACCELERATE_USE_CPU="false" if sharded else "true", DS_ACCELERATOR="cpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    if config["num_processes"] > 1:
        command += ["--main_process_port", str(free_port())]
    command += ["tests/distributed/on_cpu.py"] if sharded else []
    command += [
        "scripts/run_translation.py",
        "configs/translation/demo.yaml",
        *map(str, TINY),
        "--output_dir",
        tmp_path,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((tmp_path / "results.json").read_text())["arguments"]["optim"] == "momo_adam"
    state = json.loads((Path(tmp_path) / "trainer_state.json").read_text())
    assert [e["momo/effective_lr"] > 0 for e in state["log_history"] if "momo/effective_lr" in e] == [True, True]
