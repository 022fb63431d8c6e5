"""Every file in configs/accelerate starts the scripts through `accelerate launch`, as far as a CPU can."""

import json
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline

from tests.processes.start import CLIENT, ROOT, free_port, run


CONFIGS = sorted(path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml"))
TINY = [
    "--max_train_samples", 64, "--max_eval_samples", 2, "--per_device_train_batch_size", 8, "--vocab_size", 200,
    "--d_model", 16, "--layers", 1, "--ffn_dim", 16, "--attention_heads", 2, "--generation_max_length", 4,
    "--max_length", 48, "--logging_steps", 1, "--disable_tqdm", "True", "--max_steps", 2, "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "False", "--report_to", "none", "--optim", "momo_adam", "--learning_rate", 1e-3,
]  # fmt: skip


def launch(name, *arguments, cold=False):
    """`accelerate launch` with a config; the launched programs are forked too, unless it is `cold`."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
    sharded = config["distributed_type"] in ("FSDP", "DEEPSPEED")
    environment = {"ACCELERATE_USE_CPU": "false" if sharded else "true", "DS_ACCELERATOR": "cpu"}
    command = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    if config["num_processes"] > 1:
        command += ["--main_process_port", free_port()]
    command += [] if cold else [CLIENT]
    command += ["tests/distributed/on_cpu.py"] if sharded else []
    result = run(*command, *arguments, environment=environment, cold=cold)
    assert result.returncode == 0, result.stderr[-4000:]


def test_every_config_is_here():
    assert CONFIGS == ["bf16", "ddp", "fp16", "fsdp2", "hsdp", "single", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_launch(name, tmp_path):
    command = ["scripts/run_translation.py", "configs/translation/demo.yaml", *TINY, "--output_dir", tmp_path]
    launch(name, *command, cold=name == "single")
    assert json.loads((tmp_path / "results.json").read_text())["arguments"]["optim"] == "momo_adam"
    state = json.loads((Path(tmp_path) / "trainer_state.json").read_text())
    assert [e["momo/effective_lr"] > 0 for e in state["log_history"] if "momo/effective_lr" in e] == [True, True]


DIFFUSION = [
    "scripts/train_diffusion.py", "configs/diffusion/demo.yaml", "--block_out_channels", 8, 16, "--norm_num_groups", 4,
    "--per_device_train_batch_size", 16, "--max_eval_samples", 20, "--samples", 3, "--sampling_steps", 2,
    "--logging_steps", 1, "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4,
    "--disable_tqdm", "True", "--report_to", "none",
]  # fmt: skip


def losses(folder):
    history = json.loads((folder / "results.json").read_text())["history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def test_diffusion_trains_alike_under_every_kind_of_sharding_and_resumes(tmp_path):
    for name in ("ddp", "fsdp2", "zero2"):
        launch(name, *DIFFUSION, "--output_dir", tmp_path / name)
    expected = losses(tmp_path / "ddp")
    assert len(expected) == 7 and expected[-1] < expected[0]
    for name in ("fsdp2", "zero2"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)
    checkpoint = tmp_path / "fsdp2" / "checkpoint-2"
    launch("fsdp2", *DIFFUSION, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "fsdp2")


def test_fine_tuning_under_fsdp2_with_lora(tmp_path):
    launch(
        "fsdp2", "scripts/finetune_text_to_image.py", "configs/diffusion/demo_finetune.yaml", "--demo_steps", 2,
        "--max_steps", 2, "--eval_steps", 1, "--prior_images", 1, "--images_per_prompt", 2, "--sampling_steps", 2,
        "--per_device_train_batch_size", 8, "--lora_rank", 2, "--train_text_encoder", False, "--disable_tqdm", True,
        "--report_to", "none", "--output_dir", tmp_path,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "demo-pipeline")
    pipeline.load_lora_weights(tmp_path)
    assert any("lora_B" in name and weight.any() for name, weight in pipeline.unet.named_parameters())
