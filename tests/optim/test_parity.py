"""The optimizers against an explicit float64 version and against the authors' package."""

import itertools

import momo as authors
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momo_hf.optim import Momo, MomoAdam
from tests.reference import Reference


STEPS = 200
LRS = (1e-4, 1e-2, 1.0, 10.0)


def logistic(seed=0, rows=40, dims=(7, 3)):
    """A noisy logistic regression in two tensors: loss and gradients of a batch at given parameters."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, sum(dims)))
    labels = rng.choice([-1.0, 1.0], size=rows)

    def batch(step):
        return features[step % 5 :: 5], labels[step % 5 :: 5]

    def oracle(step, params):
        inputs, targets = batch(step)
        margins = targets * (inputs @ np.concatenate(params))
        loss = np.logaddexp(0, -margins).mean()
        grad = inputs.T @ (-targets / (1 + np.exp(margins))) / len(targets)
        return loss, np.split(grad, np.cumsum(dims)[:-1])

    return [rng.normal(size=d) for d in dims], oracle


def torch_groups(starts, lrs, decays):
    params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    groups = [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(params, lrs, decays)]
    return params, groups


def assert_follows(optimizer, params, reference, oracle, steps=STEPS, tolerance=1e-10):
    for step in range(steps):
        loss, grads = oracle(step, [p.detach().numpy() for p in params])
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        optimizer.step(loss=torch.tensor(loss))
        # Both get the same losses and gradients: at lr 10 the problem itself would amplify the last digit.
        reference.step(loss, [[g] for g in grads])
        for p, group in zip(params, reference.params):
            np.testing.assert_allclose(p.detach().numpy(), group[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(
            optimizer.param_groups[0]["effective_lr"], reference.tau * reference.rho, 1e-9, 1e-13
        )


@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("bias_correction, use_fstar", list(itertools.product([False, True], repeat=2)))
def test_momo_equals_the_explicit_version(lr, decay, bias_correction, use_fstar):
    starts, oracle = logistic()
    lrs, decays = [lr, lr / 3], [decay, decay / 2]
    params, groups = torch_groups(starts, lrs, decays)
    options = {"beta": 0.9, "bias_correction": bias_correction, "use_fstar": use_fstar, "lb": 0.01}
    reference = Reference([[x.copy()] for x in starts], lrs, decays, **options)
    assert_follows(Momo(groups, **options), params, reference, oracle)


@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("divide, use_fstar", list(itertools.product([False, True], repeat=2)))
def test_momo_adam_equals_the_explicit_version(lr, decay, divide, use_fstar):
    starts, oracle = logistic()
    # AdamW's decay needs lr * decay < 1 to be a decay at all.
    lrs, decays = [lr, lr / 3], [decay / 2, decay]
    params, groups = torch_groups(starts, lrs, decays)
    options = {"divide": divide, "use_fstar": use_fstar, "lb": 0.01}
    reference = Reference([[x.copy()] for x in starts], lrs, decays, beta2=0.999, bias_correction=True, **options)
    assert_follows(MomoAdam(groups, **options), params, reference, oracle)


@pytest.mark.parametrize("divide", [False, True])
def test_devices_without_a_fused_kernel_take_the_same_steps(divide, monkeypatch):
    monkeypatch.setattr(
        "momo_hf.optim.kernels.fused.Fused.take", classmethod(lambda cls, bucket, known: (bucket.empty, bucket))
    )
    monkeypatch.setattr(torch, "_fused_adam_", None)  # a call would raise
    test_momo_adam_equals_the_explicit_version(0.1, 0.1, divide, use_fstar=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    lrs=st.tuples(st.floats(0, 10), st.floats(0, 10)),
    decays=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    beta=st.floats(0, 0.99),
    missing=st.sets(st.tuples(st.integers(1, 19), st.integers(0, 1)), max_size=8),
    kappa=st.floats(0.01, 1),
    adam=st.booleans(),
    use_fstar=st.booleans(),
)
def test_any_groups_missing_gradients_and_clipping(seed, lrs, decays, beta, missing, kappa, adam, use_fstar):
    starts, oracle = logistic(seed)
    params, groups = torch_groups(starts, lrs, decays)
    shared = {"lb": 0.0, "use_fstar": use_fstar}
    if adam:
        optimizer = MomoAdam(groups, betas=(beta, 0.99), **shared)
    else:
        optimizer = Momo(groups, beta=beta, **shared)
    reference = Reference(
        [[x.copy()] for x in starts], list(lrs), list(decays), beta=beta, beta2=0.99 if adam else None,
        bias_correction=adam, **shared,
    )  # fmt: skip
    for step in range(20):
        loss, grads = oracle(step, [p.detach().numpy() for p in params])
        absent = [(step, i) in missing for i in range(2)]
        for p, g, gone in zip(params, grads, absent):
            p.grad = None if gone else torch.tensor(kappa * g)
        for i, group in enumerate(optimizer.param_groups):  # a schedule
            reference.lrs[i] = group["lr"] = lrs[i] * 0.9**step
        optimizer.set_clip_factor(kappa)
        optimizer.step(loss=loss)
        reference.step(loss, [[None if gone else kappa * g] for g, gone in zip(grads, absent)], kappa)
        for p, group in zip(params, reference.params):
            np.testing.assert_allclose(p.detach().numpy(), group[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("use_fstar", [False, True])
@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (Momo, authors.Momo, {"bias_correction": False}),
        (Momo, authors.Momo, {"bias_correction": True}),
        (MomoAdam, authors.MomoAdam, {"divide": True}),
        (MomoAdam, authors.MomoAdam, {"divide": False}),
    ],
)
def test_follows_the_authors_package(ours, theirs, options, lr, decay, use_fstar):
    starts, oracle = logistic()
    runs = []
    for cls in (ours, theirs):
        params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in starts]
        runs.append((params, cls(params, lr=lr, weight_decay=decay, use_fstar=use_fstar, lb=0.01, **options)))
    for step in range(STEPS):
        loss, grads = oracle(step, [p.detach().numpy() for p in runs[0][0]])
        for params, optimizer in runs:
            for p, g in zip(params, grads):
                p.grad = torch.tensor(g)
            optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        # momo-opt keeps one inner product in float32.
        for p, q in zip(runs[0][0], runs[1][0]):
            torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-4)


def test_at_the_cap_it_is_adam():
    starts, oracle = logistic()
    params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    adam_params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    momo_adam, adam = MomoAdam(params, lr=1e-3, lb=-100.0), torch.optim.Adam(adam_params, lr=1e-3)
    for step in range(50):
        loss, grads = oracle(step, [p.detach().numpy() for p in params])
        for p, q, g in zip(params, adam_params, grads):
            p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        momo_adam.step(loss=loss)
        adam.step()
    assert momo_adam.param_groups[0]["capped"] == 50
    for p, q in zip(params, adam_params):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
