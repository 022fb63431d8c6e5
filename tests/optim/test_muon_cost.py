"""What a step of MomoMuon costs on an accelerator, counted on a simulated one, and that it computes a direction once."""

import pytest
import torch

from momo_hf import MomoMuon
from momo_hf.optim.tensors.chunks import DEVICE_STACK
from tests.optim.simulated_device import Device, device
from tests.optim.test_device_cost import after_search, stepper


__all__ = ["device"]  # a fixture
WIDTH = 128
LAYER = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
NEWTON_SCHULZ = 5 * 3  # products of a batch


@pytest.mark.parametrize("options", [{}, {"averaging": True}, {"lr": "auto"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [True, False])
def test_forty_calls_beside_the_products_of_every_shape(device: Device, monkeypatch, options, dtype, clipped):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    counts = []
    for layers in (2, 12):
        matrices = device.parameters(layers * LAYER, dtype)
        others = device.parameters([(1000, WIDTH), *(10 * [(WIDTH,)])], dtype)
        groups = [{"params": matrices, "method": "muon", "weight_decay": 0.1}, {"params": others}]
        optimizer, step = stepper(MomoMuon, groups, clipped, **options)
        optimizer._verdict = None  # nothing can be read here
        with device.counted() as counted:
            step()
        products = sum(calls for name, calls in counted.calls.items() if "bmm" in str(name))
        assert products == NEWTON_SCHULZ * len(LAYER)
        counts.append(sum(counted.calls.values()) - products)
        assert counted.copies == []
    assert counts[0] == counts[1] <= 40, (counts, counted.calls)


@pytest.mark.parametrize("averaging", [False, True])
def test_forty_calls_after_a_search(device: Device, monkeypatch, averaging):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    matrices, others = device.parameters(2 * LAYER), device.parameters([(1000, WIDTH), (WIDTH,)])
    groups = [{"params": matrices, "method": "muon", "weight_decay": 0.1}, {"params": others}]
    optimizer, step = stepper(MomoMuon, groups, True, lr="auto", averaging=averaging)
    after_search(optimizer)
    step()
    with device.counted() as counted:
        step()
    products = sum(calls for name, calls in counted.calls.items() if "bmm" in str(name))
    assert counted.copies == counted.reads == []
    assert sum(counted.calls.values()) - products <= 40, counted.calls


@pytest.mark.parametrize("options", [{}, {"averaging": True}], ids=str)
def test_what_a_step_holds_is_u_and_what_the_products_of_one_stack_need(device: Device, monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    square, count = 1024, 64  # four stacks
    matrices = device.parameters(count * [(square, square)])
    _, step = stepper(MomoMuon, [{"params": matrices, "method": "muon"}], True, **options)
    with device.counted() as counted:
        step()
    # In bfloat16. Of a stack X before and after a product, and A before and after one.
    assert counted.peak <= 1.01 * 2 * (count * square**2 + 4 * DEVICE_STACK)
