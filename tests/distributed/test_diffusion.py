"""MoMo in training loops of diffusers' shape, which know nothing of it."""

import torch

from tests.distributed.launch import run_workers


def test_a_loop_of_diffusers_trains_alike_in_one_process_and_two(tmp_path):
    target = "tests.distributed.workers_diffusion:example_loop"
    (alone,) = run_workers(target, 1, tmp_path / "one")
    first, second = run_workers(target, 2, tmp_path / "two")
    losses, steps, lrs = alone["log"].T
    assert len(losses) == 12 and losses[-4:].mean() < 0.8 * losses[:4].mean()
    # The warmup starts at a cap of 0, and the cap is what the schedule says.
    assert steps[0] == 0 and steps[1:-1].min() > 0 and lrs[:2].tolist() == torch.tensor([5e-3, 1e-2]).tolist()
    torch.testing.assert_close(first["log"][:, 1:], alone["log"][:, 1:], rtol=2e-3, atol=1e-6)
    assert torch.equal(first["log"][:, 1:], second["log"][:, 1:])
    for mine, other, expected in zip(first["ema"], second["ema"], alone["ema"]):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-3)
