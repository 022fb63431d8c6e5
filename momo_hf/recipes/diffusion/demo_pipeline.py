"""A tiny text-to-image pipeline of diffusers' own classes, trained here on handwritten digits, and images of new words.

It stands in for a checkpoint from the Hub where nothing can be downloaded: the same classes, the same files, small.
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from datasets.utils import tqdm
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from momo_hf.optim import MomoAdam
from momo_hf.recipes.diffusion.denoising import denoising_losses, random_noise
from momo_hf.recipes.diffusion.judge import is_legible
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.transforms import ImageTransform


logger = logging.getLogger(__name__)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN = tuple(range(8))  # digits that the pipeline is trained on; 8 and 9 are left to the fine-tuning
SIDE = 16
BATCH = 32
CAPTION_DROPOUT = 0.1


def caption(digit: int) -> str:
    """The caption of a digit's images."""
    return f"a handwritten {WORDS[digit]}"


def digits_of(prompt: str) -> list[int]:
    """The digits that a prompt names."""
    return [digit for digit, word in enumerate(WORDS) if word in prompt.split()]


def legible_digits() -> DatasetDict:
    """scikit-learn's digits with captions, in the columns `image`, `label` and `text`, without those no one could read."""
    data = load_images("demo").filter(is_legible, input_columns=["image", "label"])
    return data.map(lambda label: {"text": caption(label)}, input_columns="label")


def new_words() -> DatasetDict:
    """Images and captions of the digits that the pipeline does not know."""
    return legible_digits().filter(lambda label: label not in KNOWN, input_columns="label")


def make_demo_pipeline(folder: Path, steps: int = 3000, seed: int = 0) -> Path:
    """Train the pipeline on the digits 0 to 7 and save it, unless it is there already.

    Args:
        folder: where it is, or is to be.
        steps: of the text encoder and the UNet together; the autoencoder takes a quarter of that.
        seed: of weights, batches and noise.

    Returns:
        The folder.
    """
    if (folder / "model_index.json").is_file():
        logger.info(f"The tiny pipeline is there: {folder}")
        return folder
    torch.manual_seed(seed)
    data = legible_digits()["train"].filter(lambda label: label in KNOWN, input_columns="label")
    transform = ImageTransform(SIDE)
    labels = torch.tensor(data["label"][:])
    pixels = torch.stack([transform(image) for image in data["image"]])

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
    )
    train_vae(vae, pixels, max(1, steps // 4))
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    train_text_to_image(unet, text_encoder, tokenizer, vae, scheduler, pixels, labels, steps)
    pipeline = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        DDIMScheduler.from_config(scheduler.config, clip_sample=False, steps_offset=1),
        None,
        None,
        None,
        False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the words of the captions."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(map(caption, range(10)), trainer)
    # transformers takes these pairs, and its type hint says texts.
    merges: list[Any] = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges, model_max_length=8)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of shape (batch, model_max_length), as a Stable Diffusion pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def fit(
    parameters: Iterable[Tensor], lr: float, rows: int, steps: int, what: str, loss_of: Callable[[Tensor], Tensor]
) -> None:
    """Train by MoMo-Adam with a linear decay, on batches of rows drawn at random.

    Args:
        parameters: to train.
        lr: the cap at the start.
        rows: how many there are to draw from.
        steps: of the training.
        what: is trained, for the bar.
        loss_of: from the numbers of the rows, int64 of shape (batch,), to the loss.
    """
    optimizer = MomoAdam(parameters, lr=lr)
    decay = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in tqdm(range(steps), desc=what):
        loss = loss_of(torch.randint(rows, (BATCH,)))
        loss.backward()
        optimizer.step(loss=loss)
        decay.step()
        optimizer.zero_grad()


def train_vae(vae: AutoencoderKL, pixels: Tensor, steps: int) -> None:
    """Train the autoencoder on squared errors and a little of the prior, and set the scale of its latents."""

    def loss_of(index: Tensor) -> Tensor:
        posterior = vae.encode(pixels[index]).latent_dist
        error = (vae.decode(posterior.sample()).sample - pixels[index]).square().mean()
        return error + 1e-5 * posterior.kl().mean()

    fit(vae.parameters(), 3e-3, len(pixels), steps, "autoencoder", loss_of)
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=float(1 / vae.encode(pixels[:500]).latent_dist.sample().std()))


def train_text_to_image(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
    pixels: Tensor,
    labels: Tensor,
    steps: int,
) -> None:
    """Train the UNet and the text encoder on latents of images and their captions."""
    ids = torch.cat([tokenize(tokenizer, [caption(digit)]) for digit in range(10)])
    empty = tokenize(tokenizer, [""])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor

    def loss_of(index: Tensor) -> Tensor:
        dropped = torch.rand(len(index), 1) < CAPTION_DROPOUT
        text = text_encoder(torch.where(dropped, empty, ids[labels[index]])).last_hidden_state
        clean = latents[index]
        noise = random_noise(scheduler, clean)
        return denoising_losses(lambda x, t: unet(x, t, text).sample, scheduler, clean, *noise).mean()

    fit([*unet.parameters(), *text_encoder.parameters()], 1e-3, len(pixels), steps, "text to image", loss_of)
