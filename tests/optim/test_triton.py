"""The kernels in Triton, run by Triton's interpreter, against the plain passes; and what they read and write."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.kernels import launch, table
from momo_hf.optim.kernels.multi_tensor import MultiTensor, MultiTensorAdam
from momo_hf.optim.kernels.plain import Plain
from tests.optim.test_kernels import bucket, passes


pytest.importorskip("triton")
BOTH = pytest.mark.parametrize("method, kernel_set", [(Momo, MultiTensor), (MomoAdam, MultiTensorAdam)])


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels run on the CPU, in small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        from momo_hf.optim.kernels import triton_passes

        patch.setattr(triton_passes, "BLOCK", 64)
        patch.setattr(launch, "runs_on", lambda device: True)
        yield


@BOTH
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(3,), (5, 4), (20, 10), (64,), (65,), (), (0,)]), min_size=1, max_size=6),
    stored=st.sampled_from(
        [torch.float32, torch.float16]
    ),  # to bfloat16 the interpreter cuts off where a device rounds
    step=st.integers(1, 300),
    seed=st.integers(0, 999),
    bad=st.sampled_from([None, float("nan"), float("inf")]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divide=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out
def test_they_do_what_the_plain_passes_do(
    method, kernel_set, known, shapes, stored, step, seed, bad, weight_decay, divide
):
    if bad is not None and shapes[0] == (0,):
        return
    group = {"weight_decay": weight_decay, "divide": divide}
    ours, plain = (bucket(method, shapes, stored, seed, bad, **group) for _ in range(2))
    before = [t.clone() for tensors in ours.roles.values() for t in tensors]
    assert len(kernel_set.take(ours, known)[0].roles["param"]) == len(shapes)
    found = passes(kernel_set, method, ours, step, bad is None, known)
    expected = passes(Plain, method, plain, step, bad is None, False)
    turned = 2**-10 if stored is torch.float16 else 0.0
    sums = slice(None) if bad is None else slice(1, None)
    for x, y in zip(found[sums], expected[sums]):
        size = 1.0 + sum(t.numel() for t in ours.roles["param"])
        torch.testing.assert_close(x, y, rtol=2e-4, atol=size * (2e-5 + turned / 8))
    for role, tensors in ours.roles.items():
        for x, y in zip(tensors, plain.roles[role]):
            torch.testing.assert_close(x, y, equal_nan=True, rtol=2e-4 + turned * (role == "param"), atol=2e-4)
    if bad is not None:
        for x, y in zip([t for tensors in ours.roles.values() for t in tensors], before):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def run(cls, steps=8, **options):
    """Some steps, with gradients that are missing, and a parameter that is a view of another shape."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 9), (130,), (4, 5)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 8, generator=generator).t()))
    optimizer = cls(params, lr=0.1, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) if (i, step) != (1, 3) and step >= i else None
        if step == 5:
            params[0].grad[0, 0] = torch.nan
        optimizer.step(loss=torch.tensor(2.0))
    assert optimizer.param_groups[0]["skipped"] == (steps > 5)
    return [p.detach() for p in params]


@BOTH
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_is_that_of_the_plain_passes_and_repeats_bit_for_bit(method, kernel_set, monkeypatch):
    monkeypatch.setattr(table, "TABLE", [table.Entry(kernel_set), table.Entry(Plain)])
    used, original = [], kernel_set.run
    monkeypatch.setattr(kernel_set, "run", lambda self, *a, **k: used.append(self) or original(self, *a, **k))
    ours = run(method, weight_decay=0.1)
    assert used
    torch.testing.assert_close(run(method, weight_decay=0.1), ours, rtol=0, atol=0)
    monkeypatch.setattr(table, "TABLE", [table.Entry(Plain)])
    torch.testing.assert_close(run(method, weight_decay=0.1), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method, known, units",
    # With g, d, v and x as large as the parameters: 5 and 4 are read and written, or 3 and 7.
    [(MomoAdam, True, 9), (MomoAdam, False, 10), (Momo, True, 6), (Momo, False, 7)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_read_and_written(method, known, units, weight_decay, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    count = 0

    def counted(name, place_of_mask):
        original = getattr(InterpreterBuilder, name)

        def call(self, pointers, *rest):
            nonlocal count
            mask = rest[place_of_mask].data
            if mask.size > 1:  # else it is of the tables, or a number of the step
                count += int(np.count_nonzero(mask)) * pointers.get_element_ty().primitive_bitwidth // 8
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, call)

    counted("create_masked_load", 0)
    counted("create_masked_store", 1)
    made = bucket(method, [(64, 40), (64, 7)], torch.float32, 0, None, weight_decay=weight_decay, divide=True)
    size = 4 * sum(t.numel() for t in made.roles["param"])
    kernel_set = MultiTensorAdam if method is MomoAdam else MultiTensor
    weight, step, ok = torch.tensor(0.1), torch.tensor(3.0), torch.tensor(True)
    kernel = kernel_set(method, made, weight, step, ok if known else None)
    kernel.products()
    kernel.write(torch.tensor(0.1), torch.tensor(0.01), ok)
    assert count == size * (units + (weight_decay > 0))
