"""MomoMuon against the formulas in float64, torch's own Muon and AdamW, and the singular value decomposition."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from momo_hf import MomoAdam, MomoMuon
from momo_hf.optim.muon import polar
from momo_hf.recipes.yardstick.muon import InFloat32
from tests.optim.muon_reference import METHODS, MuonReference, five_steps, in_groups, muon, problem


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8), (1, 6), (6, 1), (40, 30)])
def test_the_five_steps_bring_the_singular_values_near_1_and_leave_the_vectors(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    found = polar(torch.tensor(matrix)[None])[0].numpy()
    np.testing.assert_allclose(found, five_steps(matrix), rtol=1e-10, atol=1e-12)
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    in_its_axes = u.T @ found @ vt.T
    np.testing.assert_allclose(in_its_axes - np.diag(np.diag(in_its_axes)), 0, atol=1e-8)
    large = np.diag(in_its_axes)[values > 0.1 * values[0]]
    assert (large > 0.6).all() and (large < 1.3).all()


@pytest.mark.parametrize("averaging", [None, 0.5, 0.8])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize(
    "lrs, decays", [((0.05, 0.05), (0.0, 0.0)), ((0.3, 0.1), (0.2, 0.05)), ((10.0, 2.0), (0.0, 0.0))]
)
def test_steps_are_those_of_the_formulas(averaging, divide, lrs, decays):
    """With a schedule, clipped gradients and a batch that is not finite."""
    start, params, at = problem()
    per_param = [(lrs[0], decays[0]) if method == "muon" else (lrs[1], decays[1]) for method in METHODS]
    reference = MuonReference(start, METHODS, *map(list, zip(*per_param)), divide=divide, averaging=averaging)
    optimizer = MomoMuon(in_groups(params, lrs, decays), divide=divide, averaging=averaging or False)
    for k in range(40):
        scale = min(1.0, (k + 1) / 5)
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = scale * lr
        reference.lrs = [scale * lr for lr, _ in per_param]
        loss, grads = at(reference.at, k)
        kappa = 1.0 if k % 3 else 0.5
        if k == 17:
            grads[1][0, 0] = np.nan
        for p, g in zip(params, grads):
            p.grad = torch.tensor(kappa * g)
        optimizer.set_clip_factor(kappa)
        optimizer.step(loss=float(loss))
        reference.step(float(loss), [kappa * g for g in grads], kappa)
        assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(
            reference.tau * lrs[0] / max(lrs), rel=1e-8
        )
        for p, value in zip(params, reference.at):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-8, atol=1e-10)
    for p, d, method in zip(params, reference.d, METHODS):
        if method == "muon":
            np.testing.assert_allclose(optimizer.state[p]["exp_avg"].numpy(), d, rtol=1e-8, atol=1e-12)
    optimizer.eval()
    for p, value in zip(params, reference.x):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-8, atol=1e-10)


def test_at_the_cap_it_is_torchs_muon_beside_adamw():
    _, params, at = problem(dtype=torch.float32)
    params = [p for p in params if p.dim() in (1, 2)]
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    matrices, others = [p for p in theirs if p.dim() == 2], [p for p in theirs if p.dim() == 1]
    ours = MomoMuon(
        [
            {"params": [p for p in params if p.dim() == 2], "method": "muon"},
            {"params": [p for p in params if p.dim() == 1]},
        ],
        lr=1e-2,
        weight_decay=0.1,
        divide=False,
        lb=-1e9,
    )
    # Torch's average lacks the factor 1-β and its correction, which the direction does not see.
    theirs_alone = Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    adamw = AdamW(others, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(params, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step(loss=1.0)
        with InFloat32():
            theirs_alone.step()
        adamw.step()
        for p, q in zip(params, theirs):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def one_step(param, grad, **options):
    optimizer = MomoMuon([{"params": [param], "method": "muon"}], **{"lr": 0.1, "lb": -1e9, **options})
    param.grad = grad
    optimizer.step(loss=1.0)
    return param.detach()


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-22, 1e-10, 1e10])
def test_a_direction_does_not_depend_on_the_size_of_the_gradient(size):
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    directions = [polar(scale * grad[None]) for scale in (1.0, size)]
    torch.testing.assert_close(directions[1], directions[0], rtol=1e-4, atol=1e-4)


def test_a_matrix_whose_momentum_fades_stops_no_other():
    """As with a layer that is not used any more, and gradients of 0 in place of None."""
    p, q = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = MomoMuon([{"params": [p, q], "method": "muon"}], lr=1e-4)
    for k in range(900):
        p.grad, q.grad = (torch.randn(8, 8) if k == 0 else torch.zeros(8, 8)), torch.randn(8, 8)
        optimizer.step(loss=1.0)
    assert float(optimizer.param_groups[0]["skipped"]) == 0


@pytest.mark.parametrize("averaging", [False, True])
def test_zero_and_rank_deficient_gradients(averaging):
    start = torch.randn(6, 4)
    assert torch.equal(one_step(nn.Parameter(start.clone()), torch.zeros(6, 4), averaging=averaging), start)
    grad = torch.outer(torch.arange(6.0), torch.ones(4))
    moved = start - one_step(nn.Parameter(start.clone()), grad, averaging=averaging)
    assert moved.isfinite().all() and torch.linalg.matrix_rank(moved, atol=1e-4) == 1


@pytest.mark.parametrize(
    "strided",
    [
        lambda: torch.randn(4, 6).t(),
        lambda: torch.randn(12, 8)[::2, ::2],
        lambda: torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
)
def test_a_tensor_moves_as_its_contiguous_copy(strided):
    value = strided()
    grad = torch.randn_like(value)
    moved = one_step(nn.Parameter(value.clone(memory_format=torch.preserve_format)), grad)
    expected = one_step(nn.Parameter(value.contiguous()), grad.contiguous())
    torch.testing.assert_close(moved.contiguous(), expected)


def test_bfloat16_parameters_follow_float32_ones():
    start = torch.randn(16, 24).bfloat16()
    params = [nn.Parameter(start.clone()), nn.Parameter(start.float())]
    optimizers = [MomoMuon([{"params": [p], "method": "muon"}], lr=0.02) for p in params]
    for _ in range(10):
        grad = torch.randn(16, 24).bfloat16()
        for p, optimizer in zip(params, optimizers):
            p.grad = grad.to(p.dtype)
            optimizer.step(loss=50.0)
    assert optimizers[0].state[params[0]]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(params[0].float(), params[1], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("options", [{}, {"averaging": True}, {"lr": "auto"}, {"lr": "auto", "averaging": True}])
@pytest.mark.parametrize("saved", [3, 20, 70])
def test_a_resumed_run_goes_on_bit_for_bit(options, saved):
    def begin():
        _, params, at = problem(dtype=torch.float32)
        groups = in_groups(params, *([("auto",) * 2] if "lr" in options else []))
        return params, at, MomoMuon(groups, **options)

    def go_on(params, at, optimizer, steps):
        for k in steps:
            loss, grads = at([p.detach().double().numpy() for p in params], k)
            for p, g in zip(params, grads):
                p.grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step(loss=float(loss))

    whole, at, optimizer = begin()
    go_on(whole, at, optimizer, range(saved))
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in whole]
    resumed, at, other = begin()
    with torch.no_grad():
        for p, value in zip(resumed, weights):
            p.copy_(value)
    other.load_state_dict(state)
    for made, its in ((whole, optimizer), (resumed, other)):
        go_on(made, at, its, range(saved, saved + 15))
        its.eval()
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed))


def test_a_matrix_that_joins_late_begins_as_a_new_one():
    late, first = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 4))
    optimizer = MomoMuon([{"params": [first, late], "method": "muon"}], lr=0.1, lb=-1e9)
    for _ in range(3):
        first.grad = torch.randn(4, 4)
        optimizer.step(loss=1.0)
    alone = nn.Parameter(late.detach().clone())
    late.grad = torch.randn(5, 3)
    expected = one_step(alone, late.grad.clone())
    optimizer.step(loss=1.0)
    torch.testing.assert_close(late.detach(), expected)


def test_its_state_is_no_state_of_adam():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = MomoMuon([{"params": [p], "method": "muon"}])
    with pytest.raises(ValueError, match="not saved by MomoAdam: it has parameters of the method 'muon'"):
        MomoAdam([p]).load_state_dict(optimizer.state_dict())


def test_a_search_compares_every_gradient_with_the_direction_before():
    """<g_k, u_{k-1}> over <d_{k-1}, u_{k-1}>, whose direction is kept and not formed again."""
    start, params, at = problem()
    matrices = params[:5]
    optimizer = MomoMuon([{"params": matrices, "method": "muon"}], lr="auto")
    d, before, left = [np.zeros_like(x) for x in start[:5]], None, []
    for k in range(1, 9):
        loss, grads = at([p.detach().numpy() for p in params], k)
        for p, g in zip(matrices, grads):
            p.grad = torch.tensor(g)
        optimizer.step(loss=float(loss))
        d = [0.9 * old + 0.1 * g for old, g in zip(d, grads)]
        hats = [value / (1 - 0.9**k) for value in d]
        if before is not None:
            left.append(sum(np.sum(g * u) for g, u in zip(grads, before[0])) / before[1])
        u = [muon(hat) for hat in hats]
        before = u, sum(np.sum(h * w) for h, w in zip(hats, u))
    np.testing.assert_allclose(optimizer.param_groups[0]["search_left"][1:8].numpy(), left, rtol=1e-8)


def test_averaging_puts_y_in_the_middle_and_keeps_the_momentum():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = MomoMuon([{"params": [p], "method": "muon"}], averaging=True)
    assert optimizer.param_groups[0]["averaging"] == 0.5
    p.grad = torch.randn(4, 4)
    optimizer.step(loss=1.0)
    assert sorted(optimizer.state[p]) == ["ahead", "exp_avg"]


def test_parameters_without_groups_are_adams_and_it_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = MomoMuon([nn.Parameter(torch.randn(4, 4))])
    assert optimizer.param_groups[0]["method"] == "adam"
    assert "all parameters are Adam's" in caplog.text


@pytest.mark.parametrize(
    "group, match",
    [
        ({"params": [nn.Parameter(torch.zeros(3))], "method": "muon"}, r"shape \(3,\), which is no matrix"),
        (
            {"params": [nn.Parameter(torch.zeros(3, 3))], "method": "sgd"},
            "`method` must be one of 'adam', 'muon', got 'sgd'",
        ),
    ],
)
def test_groups_that_are_wrong_are_refused(group, match):
    with pytest.raises(ValueError, match=match):
        MomoMuon([group])
