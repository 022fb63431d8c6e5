"""Parameters that get their first gradient when others have trained for long, and parameters of several dtypes."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import both, compile_from, least_squares, train


def gradients(seed, step):
    return torch.randn(4, generator=torch.Generator().manual_seed(100 * seed + step), dtype=torch.float64)


@pytest.mark.parametrize("divide, weight_decay", [(True, 0.0), (False, 0.0), (False, 0.1)])
@pytest.mark.parametrize("kernel", ["fused", "plain", pytest.param("compiled", marks=pytest.mark.slow)])
def test_at_the_cap_every_parameter_takes_adams_steps(kernel, divide, weight_decay, monkeypatch):
    """Unfrozen, of an added group, or rarely used: as torch's, which counts for each; None counts as a zero gradient."""
    compile_from(monkeypatch, 1)
    if kernel == "plain":
        monkeypatch.setattr(
            "momo_hf.optim.kernels.fused.Fused.take", classmethod(lambda cls, bucket, known: (bucket.empty, bucket))
        )
    first = {0: 0, 1: 7, 2: 7, 3: 11, 4: 12}
    ours, theirs = ([nn.Parameter(gradients(i, 99)) for i in first] for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    momo = MomoAdam(ours[:4], lb=-1e6, divide=divide, compile=kernel == "compiled", **options)
    adam = torch.optim.AdamW(theirs, **options)
    for step in range(20):
        if step == 12:
            momo.add_param_group({"params": ours[4:]})
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = gradients(i, step) if step >= first[i] else None
            if i == 1 and step in (9, 10, 15):  # a rarely used expert
                p.grad, q.grad = None, torch.zeros_like(q)
                kept = q.detach().clone()
        momo.step(loss=1.0)
        adam.step()
        if step in (9, 10, 15):
            theirs[1].data.copy_(kept)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert momo.param_groups[0]["capped"] == 20


@both
def test_the_model_books_what_late_parameters_do(cls):
    params, backward = least_squares(torch.float64)
    optimizer = cls(params, lr=10.0)
    params[1].requires_grad_(False)
    train(optimizer, backward, 5)
    params[1].requires_grad_(True)
    for _ in range(3):
        before, drift = [p.detach().clone() for p in params], optimizer.param_groups[0]["drift"].clone()
        train(optimizer, backward, 1)
        moved = sum((optimizer.state[p]["exp_avg"] * (p.detach() - x)).sum() for p, x in zip(params, before))
        torch.testing.assert_close(optimizer.param_groups[0]["drift"], 0.9 * drift + moved, rtol=1e-9, atol=1e-12)


def test_the_common_case_needs_no_tensor_of_a_parameter_and_late_ones_share_theirs():
    params = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = MomoAdam(params)
    for count in (2, 2, 4, 6):
        for p in params[:count]:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    starts = [optimizer.state[p].get("start") for p in params]
    assert starts[0] is starts[1] is None
    assert starts[2] is starts[3] and starts[2] == 2
    assert starts[4] is starts[5] and starts[4] == 3
    fresh = MomoAdam(params)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = [fresh.state[p].get("start") for p in params]
    assert loaded[0] is None and loaded[2] is loaded[3] == starts[2] and loaded[4] is loaded[5] == starts[4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clone", ["state_dict", "deepcopy"])
def test_late_parameters_resume_bit_for_bit(dtype, clone):
    params, backward = least_squares(dtype)
    optimizer = MomoAdam(params, lr=0.05)
    params[1].requires_grad_(False)
    train(optimizer, backward, 300)  # bfloat16 counts to 256
    params[1].requires_grad_(True)
    train(optimizer, backward, 3)
    if clone == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = MomoAdam(others, lr=0.05)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        for p, q in zip(params, others):
            p.grad = q.grad = torch.sin(p.detach() + 1)
        optimizer.step(loss=1.0)
        resumed.step(loss=1.0)
    assert all(torch.equal(p, q) for p, q in zip(params, others))


@both
def test_each_parameter_is_computed_in_its_own_precision(cls):
    """A float64 parameter behind a float32 group, also one that is added later, moves by less than float32 can hold."""
    single, double = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    for added in (False, True):
        optimizer = cls([single], lr=1e-12) if added else cls([{"params": [single]}, {"params": [double]}], lr=1e-12)
        if added:
            optimizer.add_param_group({"params": [double]})
        before = double.detach().clone()
        single.grad, double.grad = torch.ones(3), torch.full((3,), 1 / 3, dtype=torch.float64)
        optimizer.step(loss=1.0)
        moved = before - double.detach()
        expected = 1e-12 * (double.grad if cls is Momo else torch.ones_like(moved))
        np.testing.assert_allclose(moved.numpy(), expected.numpy(), rtol=1e-3)
        assert {v.dtype for v in optimizer.state[double].values()} == {torch.float64}
        assert {v.dtype for v in optimizer.state[single].values()} == {torch.float32}
        assert all(group["drift"].dtype == torch.float64 for group in optimizer.param_groups)
