"""Train an unconditional diffusion model with MoMo-Adam.

    python scripts/train_diffusion.py configs/diffusion/demo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train_diffusion.py configs/diffusion/butterflies.yaml

A config file holds any argument of the dataclasses below and of transformers' TrainingArguments; the command line goes
on top.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from momo_hf.recipes.diffusion.denoising import denoising_losses, fixed_noise, held_out_loss, random_noise, save_grid
from momo_hf.recipes.diffusion.unet import new_unet
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.transforms import ImageTransform
from momo_hf.recipes.loop import Loop, make_accelerator, make_optimizer, make_scheduler, number_of_steps
from momo_hf.recipes.outputs import RunArguments, prepare_output, write_errors_named
from momo_hf.recipes.run import parse_run, write_results


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """What to draw."""

    dataset: str = field(metadata={"help": "`demo`, a local image folder, or a Hub name."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column with images."})
    resolution: int = field(default=64, metadata={"help": "Side of the images in pixels."})
    image_channels: int = field(default=3, metadata={"help": "1 (grey) or 3 (RGB)."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror every second image."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Held-out images to use."})
    samples: int = field(default=40, metadata={"help": "Images of a sample grid."})
    sampling_steps: int = field(default=50, metadata={"help": "DDIM steps for a sample grid."})


@dataclass
class ModelArguments:
    """The UNet and the noise."""

    block_out_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 256, 512, 512])
    attention_levels: list[int] = field(default_factory=lambda: [4], metadata={"help": "Levels with attention."})
    layers_per_block: int = field(default=2, metadata={"help": "ResNet layers per level."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of the group norm."})
    noise_schedule: str = field(
        default="linear", metadata={"help": "Betas of the noise.", "choices": ["linear", "cosine"]}
    )
    prediction_type: str = field(
        default="epsilon", metadata={"help": "What is predicted.", "choices": ["epsilon", "v_prediction"]}
    )
    num_train_timesteps: int = field(default=1000, metadata={"help": "Noise levels."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Averaged weights for evaluation; 0 turns them off."})


def new_model(data: DataArguments, args: ModelArguments) -> UNet2DModel:
    return new_unet(
        data.resolution,
        data.image_channels,
        args.block_out_channels,
        args.attention_levels,
        args.layers_per_block,
        args.norm_num_groups,
    )


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    data_args, model_args, args = parse_run((DataArguments, ModelArguments, RunArguments), argv)
    prepare_output(args)
    accelerator = make_accelerator(args)

    data = load_images(data_args.dataset, data_args.image_column)
    held_out = data["validation"].add_column("index", range(len(data["validation"])))
    held_out = held_out.select(range(min(len(held_out), data_args.max_eval_samples or len(held_out))))
    transform = ImageTransform(data_args.resolution, data_args.image_channels, flip=data_args.random_flip)
    still = ImageTransform(data_args.resolution, data_args.image_channels)
    loader = DataLoader(
        data["train"].with_transform(transform.rows()),
        args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
    )
    eval_loader = DataLoader(held_out.with_transform(still.rows(index="index")), args.per_device_eval_batch_size)

    model = new_model(data_args, model_args)
    logger.info(f"{model.num_parameters() / 1e6:.1f} M parameters, images: {data.num_rows}")
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=model_args.num_train_timesteps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[model_args.noise_schedule],
        prediction_type=model_args.prediction_type,
    )
    steps = number_of_steps(args, loader, accelerator)
    optimizer = make_optimizer(args, model, [{"params": list(model.parameters())}])
    lr_scheduler = make_scheduler(args, optimizer, steps, accelerator)
    model, optimizer, loader, eval_loader, lr_scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, lr_scheduler
    )
    decay = model_args.ema_decay
    ema = EMAModel(model.parameters(), decay, use_ema_warmup=True, power=3 / 4) if decay else None
    loop = Loop(args, accelerator, optimizer, loader, steps, ema)

    def predict(noisy, timesteps):
        return model(noisy, timesteps).sample

    def eval_losses(batch):
        noise, timesteps = fixed_noise(noise_scheduler, batch["pixel_values"], batch["index"])
        return denoising_losses(predict, noise_scheduler, batch["pixel_values"], noise, timesteps)

    def evaluate() -> None:
        with loop.evaluation():
            loss = held_out_loss(accelerator, eval_loader, eval_losses)
            loop.log({"eval_loss": loss})
            # Every process samples, because under FSDP each one holds a part of the model.
            pipeline = DDIMPipeline(accelerator.unwrap_model(model), DDIMScheduler.from_config(noise_scheduler.config))
            silent = args.disable_tqdm or not accelerator.is_local_main_process
            pipeline.set_progress_bar_config(disable=silent, desc="Samples", leave=False)
            images = pipeline(
                batch_size=data_args.samples,
                generator=torch.Generator().manual_seed(args.seed),
                num_inference_steps=data_args.sampling_steps,
            ).images
        if accelerator.is_main_process:
            save_grid(images, Path(args.output_dir) / "samples" / f"step-{loop.step:06d}.png", columns=10)

    if loop.step == 0 and loop.is_due("eval"):
        evaluate()
    model.train()
    for batch in loop.batches():
        with accelerator.accumulate(model):
            clean = batch["pixel_values"]
            loss = denoising_losses(predict, noise_scheduler, clean, *random_noise(noise_scheduler, clean)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if loop.after_backward(loss):
            if loop.is_due("eval"):
                evaluate()
            if loop.is_due("save"):
                loop.save()

    with loop.evaluation():
        state_dict = accelerator.get_state_dict(model)
    accelerator.end_training()
    if accelerator.is_main_process:
        trained = new_model(data_args, model_args)
        trained.load_state_dict(state_dict)
        with write_errors_named(Path(args.output_dir)):
            DDPMPipeline(trained, noise_scheduler).save_pretrained(args.output_dir)
        seconds = time.perf_counter() - start
        first, *later = loop.logged("eval_loss") or [None]
        metrics = {"first_eval_loss": first, "eval_loss": later[-1] if later else None}
        path = write_results(args.output_dir, metrics, seconds, data_args, model_args, args, history=loop.history)
        print(
            f"Held-out loss {metrics}, {steps} steps, {seconds:.0f} s; see {path}, training.png and samples beside it. The "
            f"model is in {args.output_dir}."
        )


if __name__ == "__main__":
    end(run_main(main))
