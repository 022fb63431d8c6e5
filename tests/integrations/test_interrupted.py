"""Trainer's restarts inside one process: batches that do not fit, interrupts, a second call of train()."""

import pytest
import torch

from momo_hf import MomoTrainer
from tests.integrations.test_transformers import arguments, step_sizes
from tests.toys import Points, TokenNet


class Fails(TokenNet):
    """Raises once, in the forward pass with the given number."""

    def __init__(self, at=None, error=None):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, inputs, labels, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return super().forward(inputs, labels, **kwargs)


class InOrder(MomoTrainer):
    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)


def train(tmp_path, model, batch, accumulation=2, calls=1, **options):
    args = arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3, **options
    )
    trainer = InOrder(model, args, train_dataset=Points(ragged=True))
    for call in range(calls):
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert call == 0
    return step_sizes(trainer)


def test_a_batch_that_does_not_fit_leaves_no_loss_behind(tmp_path):
    """Out of memory in the second micro-batch of the first window; Trainer starts again with smaller batches."""
    failing = Fails(2, RuntimeError("CUDA out of memory. Tried to allocate"))
    found = train(tmp_path, failing, batch=8, auto_find_batch_size=True)
    assert failing.calls > 6
    smaller = int(8 * 0.9)
    assert found == pytest.approx(train(tmp_path, Fails(), batch=smaller), rel=1e-6)


def test_an_interrupt_and_a_new_call_of_train_leave_no_loss_behind(tmp_path):
    found = train(tmp_path, Fails(2, KeyboardInterrupt()), batch=4, calls=2)
    assert found == pytest.approx(train(tmp_path, Fails(), batch=4), rel=1e-6)
