"""Fine-tuning a Stable-Diffusion-style pipeline: what of it is trained, and how that is saved."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn


class Denoiser(nn.Module):
    """The two networks that may be trained, as the one model that accelerate prepares."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(input_ids).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def trainable_groups(
    pipeline: StableDiffusionPipeline,
    lora_rank: int,
    train_text_encoder: bool,
    text_encoder_lr: float | None,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Freeze what is not trained, and add LoRA layers where asked for.

    Args:
        pipeline: whose networks are changed in place.
        lora_rank: of the layers in the attention; 0 trains all weights.
        train_text_encoder: as a second group, besides the UNet.
        text_encoder_lr: of that group; None: that of the other.
        dtype: of what is frozen; what is trained becomes float32.

    Returns:
        The parameter groups for an optimizer.
    """
    pipeline.vae.requires_grad_(False).to(dtype=dtype)
    parts: list[tuple[Any, float | None, list[str]]] = [(pipeline.unet, None, ["to_q", "to_k", "to_v", "to_out.0"])]
    if train_text_encoder:
        parts.append((pipeline.text_encoder, text_encoder_lr, ["q_proj", "k_proj", "v_proj", "out_proj"]))
    else:
        pipeline.text_encoder.requires_grad_(False).to(dtype=dtype)
    groups = []
    for network, lr, targets in parts:
        if lora_rank > 0:
            network.requires_grad_(False).to(dtype=dtype)
            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
        trained = [p for p in network.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.float()
        groups.append({"params": trained} if lr is None else {"params": trained, "lr": lr})
    return groups


def save_trained(
    accelerator: Accelerator,
    model: nn.Module,
    pipeline: StableDiffusionPipeline,
    lora_rank: int,
    train_text_encoder: bool,
    to: Path,
) -> None:
    """Write LoRA layers for `pipeline.load_lora_weights`, or the whole pipeline for `from_pretrained`.

    Args:
        accelerator: that prepared the model; every process calls this.
        model: the prepared `Denoiser`.
        pipeline: whose networks it trains.
        lora_rank: as given to `trainable_groups`.
        train_text_encoder: as given to `trainable_groups`.
        to: the folder.
    """
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    names = ["unet", "text_encoder"] if train_text_encoder else ["unet"]
    parts = {name: {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")} for name in names}
    if lora_rank > 0:
        layers = {
            f"{name}_lora_layers": convert_state_dict_to_diffusers(
                get_peft_model_state_dict(getattr(pipeline, name), state_dict=part)
            )
            for name, part in parts.items()
        }
        StableDiffusionPipeline.save_lora_weights(to, **layers)
        return
    # Copies, because the trained networks may be sharded.
    whole = {}
    for name, part in parts.items():
        network = getattr(pipeline, name)
        whole[name] = type(network).from_config(network.config) if name == "unet" else type(network)(network.config)
        whole[name].load_state_dict(part)
    StableDiffusionPipeline(**{**pipeline.components, **whole}, requires_safety_checker=False).save_pretrained(to)
