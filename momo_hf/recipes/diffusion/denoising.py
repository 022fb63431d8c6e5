"""The denoising loss and what goes with it: noise, targets, weights, the held-out loss, grids of samples."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets.utils import tqdm
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor


GOLDEN_RATIO = 0.6180339887
GAP = (110, 110, 110)  # the colour between the images of a grid


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The noise that a pipeline was trained with, whatever it samples with."""
    return DDPMScheduler.from_config(scheduler.config)


def target(scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model is to predict: the noise, or the velocity, as the scheduler's `prediction_type` says."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise ValueError(f"`prediction_type` must be 'epsilon' or 'v_prediction', got {kind!r}.")


def denoising_losses(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: SchedulerMixin,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Squared error of every sample.

    Args:
        predict: the model as a function of noisy samples and timesteps.
        scheduler: with `add_noise`, and a `prediction_type` in its config.
        clean: samples or latents, shape (batch, ...).
        noise: like `clean`.
        timesteps: int64 of shape (batch,).

    Returns:
        float32 of shape (batch,): the mean over a sample's elements.
    """
    predicted = predict(scheduler.add_noise(clean, noise, timesteps), timesteps)
    error = predicted.float() - target(scheduler, clean, noise, timesteps).float()
    return error.square().flatten(1).mean(1)


def random_noise(scheduler: SchedulerMixin, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh noise like `clean`, and one uniform timestep per sample."""
    steps = scheduler.config.num_train_timesteps
    return torch.randn_like(clean), torch.randint(steps, (len(clean),), device=clean.device)


def fixed_noise(scheduler: SchedulerMixin, clean: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and timesteps that depend on a sample's number alone, so that held-out losses compare across runs.

    Args:
        scheduler: gives the number of timesteps.
        clean: samples, shape (batch, ...).
        index: their numbers in the dataset, int64 of shape (batch,).

    Returns:
        Noise like `clean`, and timesteps that cover the range evenly over the dataset.
    """
    generators = [torch.Generator().manual_seed(number) for number in index.tolist()]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
    share = (index.double() * GOLDEN_RATIO) % 1
    return noise.to(clean), (share * scheduler.config.num_train_timesteps).long().to(clean.device)


def held_out_loss(accelerator: Accelerator, batches: Iterable, losses_of: Callable[[dict], Tensor]) -> float:
    """The mean loss over a prepared loader, over all processes.

    Args:
        accelerator: that prepared the loader.
        batches: the loader.
        losses_of: from a batch to one loss per sample.
    """
    bar = tqdm(batches, desc="Held-out loss", leave=False, disable=not accelerator.is_local_main_process)
    losses = [accelerator.gather_for_metrics(losses_of(batch)) for batch in bar]
    return torch.cat(losses).double().mean().item()


def min_snr_weights(scheduler: SchedulerMixin, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights of the losses at their timesteps (Hang et al. 2023, Min-SNR): min(SNR, γ) / SNR for noise prediction.

    Args:
        scheduler: gives the signal-to-noise ratios.
        timesteps: int64 of shape (batch,).
        gamma: γ, 5 in the paper.

    Returns:
        float32 of shape (batch,); for velocity prediction the quotient is by SNR + 1.
    """
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    return clipped / snr if scheduler.config.prediction_type == "epsilon" else clipped / (snr + 1)


def save_grid(images: list[Image.Image], path: Path, columns: int, side: int = 64) -> Path:
    """Write images as one PNG, row by row, with gaps; small ones are enlarged to `side` pixels without smoothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = max(side, images[0].width)
    large = [image.convert("RGB").resize((side, side), Image.Resampling.NEAREST) for image in images]
    shown = [ImageOps.expand(image, side // 16, GAP) for image in large]
    rows = -(-len(shown) // columns)
    shown += [Image.new("RGB", shown[0].size, GAP)] * (rows * columns - len(shown))
    make_image_grid(shown, rows, columns).save(path)
    return path
