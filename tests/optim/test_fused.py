"""The memory of the sets on torch's fused kernels: what is kept for the second pass, and what does not stay in it."""

import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.kernels.lists import memory
from momo_hf.optim.tensors.chunks import in_one_order
from tests.optim.problem import as_on_a_device


OPTIONS = [{}, {"averaging": True}, {"lr": "auto"}, {"weight_decay": 0.1}, {"averaging": True, "weight_decay": 0.1}]


def steps(options, gradients, size=40):
    """The parameters and their state after steps along some gradients, one group of parameters after the other."""
    params = [nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(3)]
    optimizer = MomoAdam([{"params": params[:1]}, {"params": params[1:], "eps": 1e-7}], **{"lr": 0.1, **options})
    for number, gradient in enumerate(gradients):
        for p in params:
            p.grad = gradient.clone()
        optimizer.step(loss=5.0 - number / 10)
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kept", [0, 50, 100])
def test_directions_that_are_not_kept_are_made_again(options, kept, monkeypatch):
    gradients = [torch.sin(torch.arange(40.0) + k) for k in range(6)]
    monkeypatch.setattr("momo_hf.optim.kernels.lists.TOGETHER", 1)
    monkeypatch.setattr("momo_hf.optim.kernels.memory.KEPT", kept)
    found = steps(options, gradients)
    as_on_a_device(monkeypatch)
    for ours, plain in zip(found, steps(options, gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_direction_that_is_no_number_does_not_stay(options, monkeypatch):
    """0 / 0 with an eps of 0: that step is dropped, and the next one is none the worse for it."""
    gradients = [torch.arange(40.0), torch.ones(40), torch.ones(40)]
    found = steps({**options, "eps": 0.0}, gradients)
    assert all(value.isfinite().all() for value in found)
    as_on_a_device(monkeypatch)
    for ours, plain in zip(found, steps({**options, "eps": 0.0}, gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grads", ["channels last", "contiguous"])
def test_convolutions_with_their_channels_last_are_not_copied(options, grads, monkeypatch):
    """They take the same steps, in place, also where their gradients lie otherwise."""
    ends, params = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        value = torch.linspace(-1, 1, 120).view(5, 4, 3, 2)
        params = [nn.Parameter(value.to(memory_format=memory_format)), nn.Parameter(torch.ones(4))]
        optimizer = MomoAdam(params, **{"lr": 0.1, **options})
        for number in range(6):
            for p in params:
                p.grad = torch.sin(p.detach() + number)
                p.grad = p.grad.contiguous() if grads == "contiguous" else p.grad
            optimizer.step(loss=5.0 - number / 10)
        ends.append([*params, *(value for p in params for value in optimizer.state[p].values())])
    for plain, last in zip(*ends, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("momo_hf.optim.kernels.plain.Plain.first", None)  # a call would raise
    optimizer.step(loss=1.0)


def test_what_can_be_read_as_flat_memory():
    plain, last = torch.zeros(5, 4, 3, 2), torch.zeros(5, 4, 3, 2).to(memory_format=torch.channels_last)
    volume = torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    matrix, points = torch.zeros(4, 5), torch.zeros(8, 4, 1, 1)
    others = points.as_strided(points.shape, (4, 1, 4, 4))  # the same memory in the same order
    for together in (
        [plain, plain],
        [last, last.clone()],
        [volume, volume.clone()],
        [matrix],
        [points, others],
        [torch.zeros(())],
    ):
        assert in_one_order(together)
    for apart in (
        [plain, last],
        [last, plain],
        [matrix.T, matrix.T],
        [matrix[:, ::2]],
        [plain[:, ::2]],
        [last[:, :2]],
    ):
        assert not in_one_order(apart)


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*OPTIONS, {"compile": True}])
def test_defaults_of_tensors_change_nothing(cls, dtype, options):
    """Others may want their new tensors elsewhere or in another dtype; those of a step are where the parameters are."""
    ends = []
    for device, default in (("cpu", torch.float32), ("meta", torch.float64)):
        params = [nn.Parameter(torch.linspace(-1, 1, 40).to(dtype)), nn.Parameter(torch.ones(4, dtype=dtype))]
        memory.clear()
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(default)
            with torch.device(device):
                optimizer = cls(params, **{"lr": 0.1, **options})
                for number in range(5):
                    for p in params:
                        p.grad = torch.sin(p.detach() * number)
                    optimizer.step(loss=5.0 - number / 10)
        finally:
            torch.set_default_dtype(before)
        ends.append([*params, *(value for p in params for value in optimizer.state[p].values())])
        ends[-1] += [value for value in optimizer.param_groups[0].values() if isinstance(value, torch.Tensor)]
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("lr", [1e-6, 1e-8, 3e-10])
def test_a_step_that_is_far_longer_than_all_before_counts(cls, lr, monkeypatch):
    """Then nearly nothing of z - y is left, and what is 1 to rounding may not be taken from 1."""
    ends = []
    for plain in (False, True):
        if plain:
            as_on_a_device(monkeypatch)
        p = nn.Parameter(torch.zeros(4))
        optimizer = cls([p], lr=lr, averaging=True)
        for k, rate in enumerate((lr, 1e-2, 1e-2)):
            optimizer.param_groups[0]["lr"] = rate
            p.grad = torch.full((4,), 1.0 + k)
            optimizer.step(loss=10.0)
        ends += [p.detach()]
    assert ends[0][0] < -1e-2
    torch.testing.assert_close(*ends, rtol=1e-5, atol=0)
