"""Diffusion on digits of 8x8 pixels, which come with scikit-learn: a UNet of 16 and 32 channels predicts the noise."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from momo_hf.recipes.diffusion.denoising import denoising_losses, fixed_noise, random_noise
from momo_hf.recipes.diffusion.unet import new_unet
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.images import pictures


TITLE = "diffusion, digits"
STEPS, BATCH_SIZE = 1000, 16

NOISE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def data(places: Places) -> Data:
    train, held_out, *_ = pictures("demo", 8, 1)
    return Data(TensorDataset(train.tensors[0]), held_out.tensors[0])


def model(data: Data) -> UNet2DModel:
    return new_unet(8, 1, (16, 32), attention_levels=(1,), layers_per_block=1, norm_num_groups=8)


def losses(model: nn.Module, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    return denoising_losses(lambda x, t: model(x, t).sample, NOISE, clean, noise, timesteps)


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    (clean,) = batch
    return losses(model, clean, *random_noise(NOISE, clean)).mean()


def held_out(model: nn.Module, data: Data) -> dict[str, float]:
    noise = fixed_noise(NOISE, data.held_out, torch.arange(len(data.held_out)))
    return {"loss": losses(model, data.held_out, *noise).double().mean().item()}
