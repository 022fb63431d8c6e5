"""What a step of MomoMuon costs on an accelerator, counted on a simulated one, and that it computes a direction once."""

import pytest
import torch

from momo_hf import MomoMuon
from tests.optim.simulated_device import Device, device


__all__ = ["device"]  # a fixture
WIDTH = 128
LAYER = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
NEWTON_SCHULZ = 5 * 3  # products of a batch


@pytest.mark.parametrize("options, limit", [({}, 130), ({"averaging": True}, 160), ({"lr": "auto"}, 220)])
@pytest.mark.parametrize("layers", [2, 12])
def test_calls_grow_with_the_shapes_of_the_matrices_and_not_with_their_number(
    device: Device, monkeypatch, options, limit, layers
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    matrices, others = device.parameters(layers * LAYER), device.parameters([(1000, WIDTH), *(10 * [(WIDTH,)])])
    optimizer = MomoMuon([{"params": matrices, "method": "muon"}, {"params": others}], **options)
    loss, clip_factor = (torch.empty((), device="cuda") for _ in range(2))
    optimizer.loss_source = lambda *given: (loss, clip_factor, True)
    optimizer.step()
    optimizer._verdict = None  # nothing can be read here
    with device.counted() as counted:
        optimizer.step()
    products = sum(calls for name, calls in counted.calls.items() if "bmm" in str(name))
    assert products == NEWTON_SCHULZ * len(LAYER)
    assert sum(counted.calls.values()) - products < limit
    assert counted.copies == []
