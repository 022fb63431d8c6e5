"""Diffusion: the denoising loss, grids of samples, and a tiny text-to-image pipeline to start from."""
