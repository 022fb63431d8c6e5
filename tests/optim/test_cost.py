"""What a step may cost: no value is read back, few calls whatever the number of tensors."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import as_on_a_device, compile_from


READS = {"aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten._to_cpu"}


class NoReads(TorchDispatchMode):
    """Raises where a value would leave the device; compiled code is a full graph, which cannot hold such a read."""

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.replace("::", ".") in READS:
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """Counts operators that compute; a view computes nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count += not (is_view or func is torch.ops.aten.detach.default)
        return func(*args, **(kwargs or {}))


def parameters(count=6, shape=(8, 5), dtype=torch.float32):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_fstar": True, "weight_decay": 0.1},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        {"averaging": True},
    ],
)
def test_no_value_leaves_the_device(cls, dtype, options, monkeypatch):
    compile_from(monkeypatch, 1)
    as_on_a_device(monkeypatch)
    params = parameters(dtype=dtype)
    optimizer = cls(params, lr=0.1, **options)
    optimizer.step(loss=torch.tensor(1.0))  # compiles, which may look at anything
    loss, clip = torch.tensor(2.0), torch.tensor(0.5)
    with NoReads():
        optimizer.set_clip_factor(clip)
        optimizer.step(loss=loss)
        params[0].grad.fill_(float("nan"))
        optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["skipped"] == 1


def test_the_guard_sees_a_read():
    with pytest.raises(AssertionError, match="reads a value back"), NoReads():
        float(torch.ones(()))


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
def test_calls_do_not_grow_with_the_number_of_tensors(cls):
    counts = {}
    for count in (10, 100, 1000):
        optimizer = cls(parameters(count), lr=0.1, weight_decay=0.1)
        optimizer.step(loss=1.0)
        with Calls() as calls:
            optimizer.step(loss=1.0)
        counts[count] = calls.count
    assert len(set(counts.values())) == 1, counts
