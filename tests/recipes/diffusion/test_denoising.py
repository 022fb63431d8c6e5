"""Targets, weights and the held-out loss of the diffusion scripts against their definitions."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image

from momo_hf.recipes.diffusion.denoising import (
    denoising_losses,
    fixed_noise,
    held_out_loss,
    min_snr_weights,
    random_noise,
    save_grid,
)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_are_the_squared_errors_of_the_target(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    torch.manual_seed(0)
    clean = torch.randn(6, 1, 4, 4)
    noise, timesteps = random_noise(scheduler, clean)
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    expected = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    losses = denoising_losses(predict, scheduler, clean, noise, timesteps)
    torch.testing.assert_close(seen[0][0], noisy)
    torch.testing.assert_close(losses, expected.square().mean((1, 2, 3)))

    snr = alpha.flatten() / (1 - alpha.flatten())
    weights = min_snr_weights(scheduler, timesteps, 5.0)
    divisor = snr if kind == "epsilon" else snr + 1
    torch.testing.assert_close(weights, torch.minimum(snr, torch.tensor(5.0)) / divisor, rtol=1e-4, atol=1e-6)


def test_an_unknown_target_is_named():
    scheduler = DDPMScheduler(prediction_type="sample")
    clean = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="`prediction_type` must be .* got 'sample'"):
        denoising_losses(lambda x, t: x, scheduler, clean, *random_noise(scheduler, clean))


def test_the_held_out_loss_depends_on_the_samples_alone():
    scheduler, accelerator = DDPMScheduler(), Accelerator(cpu=True)
    clean, index = torch.arange(40.0).view(10, 1, 2, 2), torch.arange(10)

    def loss(batch_size):
        batches = [{"clean": c, "index": i} for c, i in zip(clean.split(batch_size), index.split(batch_size))]

        def losses_of(batch):
            noise, timesteps = fixed_noise(scheduler, batch["clean"], batch["index"])
            return denoising_losses(lambda x, t: x, scheduler, batch["clean"], noise, timesteps)

        torch.randn(batch_size)  # other random numbers in between change nothing
        return held_out_loss(accelerator, batches, losses_of)

    assert loss(10) == pytest.approx(loss(3), rel=1e-6)
    _, timesteps = fixed_noise(scheduler, torch.zeros(1000, 1), torch.arange(1000))
    # Evenly over the noise levels: every tenth of them has about a tenth of the samples.
    assert timesteps.bincount(minlength=1000).view(10, 100).sum(1).sub(100).abs().max() <= 2


def test_grids_keep_the_order_and_fill_up(tmp_path):
    images = [Image.new("L", (2, 2), 50 * i) for i in range(5)]
    grid = Image.open(save_grid(images, tmp_path / "grids" / "a.png", columns=3, side=16))
    assert grid.size == (3 * 18, 2 * 18) and grid.getpixel((0, 0)) == (110, 110, 110)
    assert [grid.getpixel((18 * column + 8, 18 * row + 8))[0] for row in (0, 1) for column in range(3)] == [
        0, 50, 100, 150, 200, 110,
    ]  # fmt: skip
