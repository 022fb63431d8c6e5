"""Fine-tuning a text-to-image pipeline, made here of the digits 0 to 7, on captioned pictures of 8 and 9."""

import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from momo_hf.recipes.diffusion.demo_pipeline import CAPTION_DROPOUT, SIDE, make_demo_pipeline, new_words, tokenize
from momo_hf.recipes.diffusion.denoising import denoising_losses, fixed_noise, random_noise, training_scheduler
from momo_hf.recipes.diffusion.finetuning import Denoiser
from momo_hf.recipes.images.transforms import ImageTransform
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.source import fingerprint_of


TITLE = "fine-tuned text-to-image"
STEPS, BATCH_SIZE = 1000, 8

PIPELINE_STEPS = 3000


def data(places: Places) -> Data:
    folder = places.made(
        f"pipeline-{fingerprint_of(__file__)}", lambda folder: make_demo_pipeline(folder, PIPELINE_STEPS)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    transform, vae = ImageTransform(SIDE), pipeline.vae

    def latents_and_words(rows: Dataset) -> TensorDataset:
        pixels = torch.stack([transform(image) for image in rows["image"]])
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return TensorDataset(latents, tokenize(pipeline.tokenizer, rows["text"][:]))

    words = new_words()
    parts = {
        "folder": folder,
        "noise": training_scheduler(pipeline.scheduler),
        "empty": tokenize(pipeline.tokenizer, [""]),
    }
    return Data(latents_and_words(words["train"]), latents_and_words(words["validation"]), parts)


class Painter(nn.Module):
    """UNet and text encoder of the pipeline, with what their loss needs besides."""

    def __init__(self, parts: dict) -> None:
        super().__init__()
        self.denoiser = Denoiser(StableDiffusionPipeline.from_pretrained(parts["folder"], safety_checker=None))
        self.noise, self.empty = parts["noise"], parts["empty"]

    def losses(self, clean: Tensor, words: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return denoising_losses(lambda x, t: self.denoiser(x, t, words), self.noise, clean, noise, timesteps)


def model(data: Data) -> Painter:
    return Painter(data.parts)


def loss(model: Painter, batch: list[Tensor]) -> Tensor:
    clean, words = batch
    dropped = torch.rand(len(clean), 1) < CAPTION_DROPOUT
    return model.losses(clean, torch.where(dropped, model.empty, words), *random_noise(model.noise, clean)).mean()


def held_out(model: Painter, data: Data) -> dict[str, float]:
    clean, words = data.held_out.tensors
    noise = fixed_noise(model.noise, clean, torch.arange(len(clean)))
    return {"loss": model.losses(clean, words, *noise).double().mean().item()}
