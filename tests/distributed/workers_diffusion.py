"""A training loop in the shape of diffusers' example scripts, with MomoAdam for AdamW as the one change."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from momo_hf import MomoAdam


class Noised(Dataset):
    """Images with noise and timesteps of their own, so that every number of processes trains on the same."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image, noise = torch.randn(2, 1, 8, 8, generator=generator)
        return {"image": image.tanh(), "noise": noise, "timestep": (index * 31) % 1000}


def example_loop(folder, accumulation=2, epochs=3):
    """Returns the losses, the effective step sizes and the averaged weights."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    ema_model = EMAModel(model.parameters(), decay=0.99, model_cls=UNet2DModel, model_config=model.config)
    noise_scheduler = DDPMScheduler()
    optimizer = MomoAdam(model.parameters(), lr=1e-2)
    train_dataloader = DataLoader(Noised(), batch_size=4 // accelerator.num_processes)
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=2 * accelerator.num_processes,
        num_training_steps=len(train_dataloader) * epochs // accumulation,
    )
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    log = []
    for _ in range(epochs):
        model.train()
        for batch in train_dataloader:
            clean_images, noise, timesteps = batch["image"], batch["noise"], batch["timestep"]
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                group = optimizer.param_groups[0]
                log.append([float(loss.detach()), float(group["effective_lr"]), float(group["lr"])])
    return {"log": torch.tensor(log), "ema": [p.clone() for p in ema_model.shadow_params]}
