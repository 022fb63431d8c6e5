"""What a step costs on an accelerator: calls, bytes, copies from the host and memory, on a simulated one."""

import pytest
import torch

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.chunks import DEVICE_PIECE
from momo_hf.optim.kernels import launch
from tests.optim.simulated_device import Device, device


__all__ = ["device"]  # a fixture
METHODS = pytest.mark.parametrize("cls", [Momo, MomoAdam])
SMALL_GPT = [(1000, 128), *(4 * [(384, 128), (384,), (128, 128), (128,), (512, 128), (512,), (128, 512), (128,)])]


def stepper(cls, params, clipped, **options):
    """A function that takes a step with loss and clip factor on the device, after the first step."""
    optimizer = cls(params, **options)
    loss, clip_factor = (torch.empty((), device="cuda") for _ in range(2))
    if clipped:  # as the wiring of accelerate gives it: from the norm of all gradients
        optimizer.loss_source = lambda *given: (loss, clip_factor, True)
        step = optimizer.step
    else:
        step = lambda: optimizer.step(loss=loss)  # noqa: E731
    step()
    return optimizer, step


def test_the_counter_counts_what_is_known_of_torch(device: Device):
    params = device.parameters(SMALL_GPT)
    size = 4 * sum(p.numel() for p in params)
    for options, units in (({"fused": True}, 8), ({"foreach": True}, 21)):
        optimizer = torch.optim.AdamW(params, **options)
        optimizer.step()
        with device.counted() as counted:
            optimizer.step()
        assert counted.bytes / size == pytest.approx(units, rel=1e-3)
        assert sum(counted.calls.values()) < 12
    with device.counted() as counted:
        torch.tensor([1.0, 2.0], device="cuda")
        assert len(counted.copies) == 1
        with pytest.raises(AssertionError, match="reads a value back"):
            torch.empty((), device="cuda").item()
    with device.counted() as counted:
        one = torch.empty(100, device="cuda")
        two = one + one
        del one, two
        torch.empty(100, device="cuda")
    assert (counted.peak, counted.held, counted.bytes) == (800, 0, 1200)


@METHODS
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_few_calls_whatever_the_number_of_tensors(device: Device, cls, clipped, weight_decay):
    counts = []
    for number in (10, 100, 1000):
        _, step = stepper(cls, device.parameters(number * [(8, 5)]), clipped, weight_decay=weight_decay)
        with device.counted() as counted:
            step()
        counts.append(sum(counted.calls.values()))
        assert counted.calls["triton"] == 4
    assert len(set(counts)) == 1 and counts[0] <= 40, (counts, counted.calls)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("clipped", [True, False])
def test_nothing_that_a_graph_could_not_capture(device: Device, cls, dtype, lr, clipped):
    params = device.parameters(SMALL_GPT, dtype)
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.5}]
    optimizer, step = stepper(cls, groups, clipped, use_fstar=True)
    if lr == "tensor":
        for group in optimizer.param_groups:
            group["lr"] = torch.empty((), device="cuda")
        step()
    with device.counted() as counted:
        step()
    assert counted.copies == counted.reads == []
    assert sum(counted.calls.values()) <= 40, counted.calls


def test_a_number_that_changes_is_filled_in_and_not_copied(device: Device):
    optimizer = MomoAdam(device.parameters(SMALL_GPT))
    optimizer.step(loss=1.0)
    with device.counted() as counted:
        optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler does
        optimizer.step(loss=2.0)
    assert counted.copies == []


PACKS = 20 * [(DEVICE_PIECE // 1000 - 1, 1000)]  # two of them make a pack of almost two pieces


@METHODS
@pytest.mark.parametrize("shapes", [[(1 << 26,)], PACKS], ids=["large", "packs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("triton", [True, False])
def test_temporaries_are_small(device: Device, cls, shapes, dtype, triton, monkeypatch):
    monkeypatch.setattr(launch, "has_triton", lambda: triton)
    _, step = stepper(cls, device.parameters(shapes, dtype), clipped=True, weight_decay=0.1)
    with device.counted() as counted:
        step()
    assert (counted.calls["triton"] > 0) == triton
    # With Triton a row of sums for every block of 2048, and where they are.
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    assert 0 < counted.peak <= (4 * elements * 0.005 if triton else 64 << 20)
