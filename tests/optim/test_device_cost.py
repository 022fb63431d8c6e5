"""What a step costs on an accelerator: calls, bytes, copies from the host and memory, on a simulated one."""

import pytest
import torch

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.kernels import launch
from momo_hf.optim.steps.ramp import resume_ramp
from momo_hf.optim.tensors.chunks import DEVICE_PIECE
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


# Calls of a step with one group at most.
CALLS = {"modelled": 17, "averaged": 17, "search": 28}
KINDS = {"modelled": {}, "averaged": {"averaging": True}, "search": {"lr": "auto"}}


@METHODS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_few_calls_whatever_the_number_of_tensors(device: Device, cls, kind, clipped, weight_decay):
    counts = []
    for number in (10, 100, 400):
        params = device.parameters(number * [(8, 5), (8, 4, 3, 3)])
        for p in params[1::2]:  # as `model.to(memory_format=torch.channels_last)` puts convolutions
            p.data = p.data.to(memory_format=torch.channels_last)
            p.grad = torch.empty_like(p)
        optimizer, step = stepper(cls, params, clipped, weight_decay=weight_decay, **KINDS[kind])
        optimizer._verdict = None  # nothing can be read here
        with device.counted() as counted:
            step()
        counts.append(sum(counted.calls.values()))
        assert counted.calls["triton"] == 4
    assert len(set(counts)) == 1 and counts[0] <= CALLS[kind], (counts, counted.calls)


def after_search(optimizer):
    """Let a search be over, as a read of the verdict would."""
    optimizer._searching, optimizer._verdict = False, None
    resume_ramp(optimizer.state, False, optimizer.averages)
    for group in optimizer.param_groups:
        group["lr_stand_in"] = 0.0


@METHODS
@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("embeddings", [(), (0,)])
def test_few_calls_after_a_search(device: Device, cls, averaging, clipped, embeddings):
    """As with the preset: the cap is that of the search, and with averaging the largest `lr` is remembered."""
    params = device.parameters(SMALL_GPT)
    groups = [
        {"params": params[:3], "weight_decay": 0.1, "tables": embeddings, "embeddings": embeddings},
        {"params": params[3:]},
    ]
    optimizer, step = stepper(cls, groups, clipped, lr="auto", averaging=averaging)
    after_search(optimizer)
    step()
    with device.counted() as counted:
        step()
    assert counted.copies == counted.reads == []
    assert sum(counted.calls.values()) <= 40, counted.calls


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("options", [{"use_fstar": True}, {"averaging": True}], ids=["modelled", "averaged"])
def test_nothing_that_a_graph_could_not_capture(device: Device, cls, dtype, lr, clipped, options):
    params = device.parameters(SMALL_GPT, dtype)
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.5}]
    optimizer, step = stepper(cls, groups, clipped, **options)
    if lr == "tensor":
        for group in optimizer.param_groups:
            group["lr"] = torch.empty((), device="cuda")
        step()
    with device.counted() as counted:
        step()
    assert counted.copies == counted.reads == []
    assert sum(counted.calls.values()) <= 40, counted.calls
    # Beside the kernels in Triton, whose bytes are counted in `test_triton`: the norms of the gradients, if need be.
    assert counted.bytes <= (0.05 + (not clipped)) * sum(p.numel() * p.element_size() for p in params)


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
@pytest.mark.parametrize("averaging", [False, True])
def test_temporaries_are_small(device: Device, cls, shapes, dtype, triton, averaging, monkeypatch):
    monkeypatch.setattr(launch, "has_triton", lambda: triton)
    params = device.parameters(shapes, dtype)
    _, step = stepper(cls, params, clipped=True, weight_decay=0.1, averaging=averaging)
    with device.counted() as counted:
        step()
    assert (counted.calls["triton"] > 0) == triton
    # With Triton a row of sums for every block of 2048, and where they are.
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    assert 0 < counted.peak <= (4 * elements * 0.005 if triton else 64 << 20)
