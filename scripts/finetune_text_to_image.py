"""Fine-tune a Stable-Diffusion-style pipeline with MoMo-Adam: the full UNet or LoRA, with or without the text encoder.

    python scripts/finetune_text_to_image.py configs/diffusion/demo_finetune.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml \
        scripts/finetune_text_to_image.py configs/diffusion/text_to_image_lora.yaml

A config file holds any argument of the dataclasses below and of transformers' TrainingArguments; the command line goes
on top.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.utils.data import DataLoader

from momo_hf.recipes.diffusion.demo_pipeline import digits_of, make_demo_pipeline, new_words, tokenize
from momo_hf.recipes.diffusion.denoising import (
    denoising_losses,
    fixed_noise,
    held_out_loss,
    min_snr_weights,
    random_noise,
    save_grid,
    training_scheduler,
)
from momo_hf.recipes.diffusion.finetuning import Denoiser, save_trained, trainable_groups
from momo_hf.recipes.diffusion.judge import DigitJudge
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import InputError, run_main
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.transforms import ImageTransform
from momo_hf.recipes.loop import Loop, make_accelerator, make_optimizer, make_scheduler, number_of_steps
from momo_hf.recipes.outputs import RunArguments, prepare_output, write_errors_named
from momo_hf.recipes.run import parse_run, write_results


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Images, captions, and what to show."""

    dataset: str = field(metadata={"help": "`demo` (the digits 8 and 9), a local image folder, or a Hub name."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column with images."})
    caption_column: str = field(default="text", metadata={"help": "The column with captions."})
    resolution: int = field(default=512, metadata={"help": "Side of the images in pixels."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror every second image."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many images."})
    max_eval_samples: int | None = field(default=200, metadata={"help": "Held-out images to use."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions left empty, for guidance."})
    prior_prompts: list[str] | None = field(
        default=None,
        metadata={"help": "What the pipeline must not forget: images of these prompts, by itself, join the training."},
    )
    prior_images: int = field(default=0, metadata={"help": "Images of every prior prompt."})
    validation_prompts: list[str] = field(default_factory=list, metadata={"help": "A row of the grid each."})
    images_per_prompt: int = field(default=4, metadata={"help": "Columns of the grid."})
    sampling_steps: int = field(default=50, metadata={"help": "Steps of the pipeline's scheduler."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Classifier-free guidance."})


@dataclass
class ModelArguments:
    """The pipeline and what of it is trained."""

    model: str = field(metadata={"help": "A pipeline by folder or Hub name; `demo` trains a tiny one first, once."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA layers; 0 trains all weights."})
    train_text_encoder: bool = field(
        default=False, metadata={"help": "As a second parameter group; with LoRA transformers wants peft 0.22."}
    )
    text_encoder_lr: float | None = field(default=None, metadata={"help": "Its learning rate; default: the same."})
    min_snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting; 5 is usual."})
    demo_steps: int = field(default=3000, metadata={"help": "Training steps of the `demo` pipeline."})


def draw(
    pipeline: StableDiffusionPipeline, prompt: str, images: int, args: DataArguments, seed: int
) -> list[Image.Image]:
    return pipeline(
        [prompt] * images,
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.sampling_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    ).images


def load_data(args: DataArguments) -> tuple[Dataset, Dataset]:
    """Images with captions: to train on and held out. The demo's are the digits that its pipeline does not know."""
    if args.dataset == "demo":
        data = new_words()
    else:
        data = load_images(args.dataset, args.image_column, None, args.caption_column)
    data = data.select_columns(["image", "text"])
    train, held_out = data["train"], data["validation"]
    train = train.select(range(min(len(train), args.max_train_samples or len(train))))
    return train, held_out.select(range(min(len(held_out), args.max_eval_samples or len(held_out))))


def with_prior(train: Dataset, pipeline: StableDiffusionPipeline, args: DataArguments, seed: int) -> Dataset:
    """Add images that the pipeline makes of the prior prompts, before it is changed."""
    prompts = [prompt for prompt in args.prior_prompts or [] for _ in range(args.prior_images)]
    images = [
        image
        for number, prompt in enumerate(args.prior_prompts or [])
        for image in draw(pipeline, prompt, args.prior_images, args, seed + 1000 + number)
    ]
    if not images:
        return train
    prior = Dataset.from_dict({"image": images, "text": prompts}, features=train.features)
    return concatenate_datasets([train, prior])


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    data_args, model_args, args = parse_run((DataArguments, ModelArguments, RunArguments), argv)
    prepare_output(args)
    accelerator = make_accelerator(args)
    output = Path(args.output_dir)
    path = model_args.model
    if path == "demo":
        with accelerator.main_process_first():
            path = make_demo_pipeline(output / "demo-pipeline", steps=model_args.demo_steps)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, requires_safety_checker=False)
    except ValueError as error:
        raise InputError(f"model={path!r} cannot be loaded: {error}") from error
    silent = args.disable_tqdm or not accelerator.is_local_main_process
    pipeline.set_progress_bar_config(disable=silent, desc="Samples", leave=False)
    pipeline.to(accelerator.device)
    tokenizer, vae, noise_scheduler = pipeline.tokenizer, pipeline.vae, training_scheduler(pipeline.scheduler)
    judge = DigitJudge() if model_args.model == "demo" else None
    accuracies = {}

    def show(when: str) -> None:
        # Every process draws, because under FSDP each one holds a part of the model.
        with accelerator.autocast():
            images = [
                draw(pipeline, prompt, data_args.images_per_prompt, data_args, args.seed)
                for prompt in data_args.validation_prompts
            ]
        if accelerator.is_main_process and images:
            save_grid(sum(images, []), output / "samples" / f"{when}.png", data_args.images_per_prompt)
        if judge is not None:
            for prompt, row in zip(data_args.validation_prompts, images):
                shares = accuracies.setdefault(when, {})
                shares[prompt] = float(np.isin(judge.digits(row), digits_of(prompt)).mean())

    train, held_out = load_data(data_args)
    train = with_prior(train, pipeline, data_args, args.seed)
    transform = ImageTransform(data_args.resolution, flip=data_args.random_flip).rows(text="text")
    loader = DataLoader(
        train.with_transform(transform),
        args.per_device_train_batch_size,
        shuffle=True,
        drop_last=len(train) > args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    held_out = held_out.add_column("index", range(len(held_out)))
    still = ImageTransform(data_args.resolution).rows(text="text", index="index")
    eval_loader = DataLoader(held_out.with_transform(still), args.per_device_eval_batch_size)

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    rank, text_encoder = model_args.lora_rank, model_args.train_text_encoder
    groups = trainable_groups(pipeline, rank, text_encoder, model_args.text_encoder_lr, dtype)
    steps = number_of_steps(args, loader, accelerator)
    model = Denoiser(pipeline)
    optimizer = make_optimizer(args, model, groups)
    lr_scheduler = make_scheduler(args, optimizer, steps, accelerator)
    model, optimizer, loader, eval_loader, lr_scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, lr_scheduler
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    loop = Loop(args, accelerator, optimizer, loader, steps)
    logger.info(
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M trained parameters, {len(train)} images, {steps} steps"
    )

    def losses_of(batch: dict, fixed: bool) -> torch.Tensor:
        with torch.no_grad():
            posterior = vae.encode(batch["pixel_values"].to(vae.dtype)).latent_dist
            clean = (posterior.mode() if fixed else posterior.sample()).float() * vae.config.scaling_factor
        dropped = torch.rand(len(clean)) < (0 if fixed else data_args.caption_dropout)
        ids = tokenize(tokenizer, ["" if drop else text for drop, text in zip(dropped, batch["text"])]).to(
            clean.device
        )
        noise, timesteps = (
            fixed_noise(noise_scheduler, clean, batch["index"]) if fixed else random_noise(noise_scheduler, clean)
        )
        losses = denoising_losses(lambda x, t: model(x, t, ids), noise_scheduler, clean, noise, timesteps)
        if fixed or model_args.min_snr_gamma is None:
            return losses
        return losses * min_snr_weights(noise_scheduler, timesteps, model_args.min_snr_gamma)

    def evaluate(when: str) -> None:
        with loop.evaluation():
            loss = held_out_loss(accelerator, eval_loader, lambda batch: losses_of(batch, fixed=True))
            loop.log({"eval_loss": loss})
            show(when)

    if loop.step == 0 and loop.is_due("eval"):
        evaluate("before")
    model.train()
    for batch in loop.batches():
        with accelerator.accumulate(model):
            loss = losses_of(batch, fixed=False).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if loop.after_backward(loss):
            if loop.is_due("eval"):
                evaluate("after" if loop.step == steps else f"step-{loop.step:06d}")
            if loop.is_due("save"):
                loop.save()

    with loop.evaluation(), write_errors_named(output):
        save_trained(accelerator, model, pipeline, rank, text_encoder, output)
    accelerator.end_training()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        first, *later = loop.logged("eval_loss") or [None]
        metrics = {"first_eval_loss": first, "eval_loss": later[-1] if later else None}
        more = {"history": loop.history, "accuracy": accuracies}
        found = write_results(args.output_dir, metrics, seconds, data_args, model_args, args, **more)
        for when, shares in accuracies.items():  # a resumed run has no "before"
            print(f"Right {when}: " + ", ".join(f"{prompt} {share:.0%}" for prompt, share in shares.items()))
        trained_part = "The LoRA layers are" if rank else "The pipeline is"
        print(
            f"Held-out loss {metrics}, {steps} steps, {seconds:.0f} s; see {found}, training.png and samples beside it. "
            f"{trained_part} in {output}."
        )


if __name__ == "__main__":
    end(run_main(main))
