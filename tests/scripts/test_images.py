"""The image scripts as a user runs them, at a tiny size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image

from momo_hf.recipes.images.data import load_images
from tests.scripts.conftest import documented


QUIET = ["--disable_tqdm", "True", "--use_cpu", "True"]
DIFFUSION = [
    "scripts/train_diffusion.py", "configs/diffusion/demo.yaml", *QUIET, "--block_out_channels", 8, 16,
    "--norm_num_groups", 4, "--per_device_train_batch_size", 16, "--max_eval_samples", 20, "--samples", 3,
    "--sampling_steps", 2, "--logging_steps", 1, "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2,
    "--gradient_accumulation_steps", 2, "--max_steps", 4, "--save_total_limit", 2,
]  # fmt: skip


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_image_classification(run_script, tmp_path):
    script = ["scripts/run_image_classification.py", "configs/image_classification/demo.yaml", *QUIET]
    shown = run_script(
        *script, "--output_dir", tmp_path, "--save_strategy", "epoch", "--num_train_epochs", 3, cold=True
    ).stdout
    found = results(tmp_path)
    assert "Top-1 accuracy" in shown and found["metrics"]["eval_accuracy"] > 0.9
    assert {"loss", "momo/effective_lr"} <= set(found["history"][0])
    assert any(tmp_path.rglob("events.out.tfevents*"))
    assert all(Image.open(tmp_path / name).width > 500 for name in ("training.png", "confusion.png"))
    assert f"The model is in {tmp_path}" in shown
    # Loaded as configs/README.md says, it is as good as the run says.
    namespace = {}
    exec(documented("ImageTransform").replace("outputs/image-classification-demo", str(tmp_path)), namespace)
    model, data = namespace["model"], load_images("demo")["validation"]
    assert model.config.id2label[7] == "7" and model.num_parameters() == 64 * 100 + 100 + 100 * 100 + 100 + 1010
    images = torch.stack([namespace["transform"](image) for image in data["image"]])
    right = [model.config.id2label[i] for i in model(images).logits.argmax(-1).tolist()] == np.array(
        data["label"][:], str
    )
    assert right.mean() == pytest.approx(found["metrics"]["eval_accuracy"], abs=1e-9)


def test_other_models_augmentation_and_fine_tuning(run_script, tmp_path):
    vit = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
    }
    script = ["scripts/run_image_classification.py", "configs/image_classification/demo.yaml", *QUIET]
    options = ["--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 2]
    options += ["--random_padding", 1, "--random_flip", "True", "--max_train_samples", 128]
    first = tmp_path / "first"
    run_script(*script, *options, "--output_dir", first, "--model", "vit", "--model_options", json.dumps(vit))
    run_script(*script, *options, "--output_dir", tmp_path / "second", "--model", first)
    assert results(tmp_path / "second")["arguments"]["model"] == str(first)


def test_train_diffusion_and_resume(run_script, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    run_script(*DIFFUSION, "--output_dir", once, cold=True)
    found = results(once)
    assert found["metrics"]["eval_loss"] < found["metrics"]["first_eval_loss"]
    grids = sorted(path.name for path in (once / "samples").iterdir())
    assert grids == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert Image.open(once / "samples" / grids[0]).size == (720, 72)
    assert any(once.rglob("events.out.tfevents*"))

    shutil.copytree(once / "checkpoint-2", twice / "checkpoint-2")
    run_script(*DIFFUSION, "--output_dir", twice, "--resume_from_checkpoint", "True")
    assert results(twice)["history"] == found["history"] and results(twice)["metrics"] == found["metrics"]
    assert Image.open(twice / "samples" / grids[2]).tobytes() == Image.open(once / "samples" / grids[2]).tobytes()
    # The averaged weights, which are what is saved, come through the checkpoint too.
    first, second = (DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in (once, twice))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("rank", [0, 2])
def test_finetune_text_to_image(run_script, tmp_path, rank):
    shown = run_script(
        "scripts/finetune_text_to_image.py", "configs/diffusion/demo_finetune.yaml", *QUIET, "--output_dir", tmp_path,
        "--demo_steps", 2, "--max_steps", 2, "--eval_steps", 1, "--prior_images", 1, "--images_per_prompt", 2,
        "--sampling_steps", 2, "--lora_rank", rank, "--text_encoder_lr", 1e-4, "--min_snr_gamma", 5,
        "--logging_steps", 1, "--per_device_train_batch_size", 8, "--train_text_encoder", not rank, cold=rank == 0,
    ).stdout  # fmt: skip
    assert "a handwritten nine" in shown
    found = results(tmp_path)
    assert set(found["accuracy"]) == {"before", "step-000001", "after"} and len(found["accuracy"]["after"]) == 10
    assert Image.open(tmp_path / "samples" / "after.png").size == (144, 720)

    before = StableDiffusionPipeline.from_pretrained(tmp_path / "demo-pipeline")
    if rank:
        # Loaded as configs/README.md says.
        code = documented("load_lora_weights").replace("outputs/own-lora", str(tmp_path))
        namespace = {}
        exec(code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tmp_path / "demo-pipeline")), namespace)
        after = namespace["pipeline"]
        assert namespace["picture"].size == (16, 16)
        assert any("lora_A" in name and "attn" in name for name, _ in after.unet.named_modules())
    else:
        after = StableDiffusionPipeline.from_pretrained(tmp_path)
        for part in ("unet", "text_encoder"):
            weights = [dict(getattr(p, part).named_parameters()) for p in (before, after)]
            assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

    def image(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        return np.asarray(pipeline("a handwritten nine", **options).images[0], int)

    assert (image(before) != image(after)).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_and_too_few_classes(run_script, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script = ["scripts/run_image_classification.py", "configs/image_classification/demo.yaml", *QUIET]
    script += ["--dataset", tmp_path / "data", "--output_dir", tmp_path / "out", "--dataloader_num_workers", workers]
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    for i in range(10):
        Image.new("L", (8, 8), i).save(tmp_path / "data" / "train" / "cat" / f"{i}.png")
    message = "has no class: give every class a folder of its own"
    if workers:
        (tmp_path / "data" / "train" / "dog").mkdir()
        for i in range(10):
            (tmp_path / "data" / "train" / "dog" / f"{i}.png").write_bytes(b"")
        script += ["--random_flip", "True"]  # so that pictures are read by the worker
        message = ".png: the picture cannot be read"
    result = run_script(*script, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("run_image_classification.py: error: ") and message in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "./nowhere"], "'./nowhere' does not exist"),
        (["--resume_from_checkpoint", "./nothing"], "resume_from_checkpoint='./nothing' is not a folder"),
        (["--noise_schedule", "wavy"], "invalid choice: 'wavy'"),
        (["--per_device_train_batch_size", 2000], "per_device_train_batch_size=2000 leaves no whole batch"),
    ],
)
def test_wrong_arguments_are_named(run_script, arguments, message, tmp_path):
    result = run_script(*DIFFUSION, "--output_dir", tmp_path, *arguments, check=False)
    assert result.returncode != 0 and message in result.stderr
