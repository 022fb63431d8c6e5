"""The two modes of an optimizer that averages its iterates, and its state."""

import copy
import pickle

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam
from tests.averaging_reference import more_steps, problem, trained
from tests.optim.problem import both, least_squares
from tests.optim.test_transaction import snapshot, unchanged


# ---- The modes ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_modes_round_once_and_do_not_drift(dtype):
    optimizer, params, _ = trained(dtype)
    y = [p.detach().clone() for p in params]
    ahead = [optimizer.state[p]["ahead"].clone() for p in params]
    optimizer.train()  # it is in this mode
    assert all(map(torch.equal, params, y))
    optimizer.eval()
    x = [p.detach().clone() for p in params]
    held = [optimizer.state[p].get("y", old).double() for p, old in zip(params, y)]
    exact = [(h - 0.3 * (h + a.double())) / 0.7 for h, a in zip(held, ahead)]
    for p, e in zip(params, exact):
        torch.testing.assert_close(p.double(), e, rtol=max(torch.finfo(dtype).eps, 1e-14), atol=1e-16)
    assert not torch.equal(x[0], y[0])
    optimizer.eval()
    assert all(map(torch.equal, params, x))
    optimizer.train()
    back = [p.detach().clone() for p in params]
    for b, old, average in zip(back, y, x):
        # One rounding of x, and one of y.
        assert ((b - old).abs() <= torch.finfo(dtype).eps * torch.maximum(old.abs(), average.abs())).all()
    if dtype.itemsize == 2:
        assert all(map(torch.equal, back, y))
    for _ in range(1000):
        optimizer.eval()
        now = [p.detach().clone() for p in params]
        optimizer.train()
        if dtype != torch.float64:
            assert all(map(torch.equal, now, x)) and all(map(torch.equal, params, back))
    torch.testing.assert_close(params, [nn.Parameter(b) for b in back], rtol=1e-13, atol=1e-13)
    assert all(torch.equal(optimizer.state[p]["ahead"], old) for p, old in zip(params, ahead))


def test_most_parameters_come_back_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(100_000, generator=generator))
    optimizer = MomoAdam([p], lr=1e-2, averaging=True)
    for _ in range(20):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(loss=1.0)
    before = p.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert (before == p).float().mean() > 0.99


def test_a_step_in_eval_mode_names_the_fix():
    optimizer, params, at = trained()
    optimizer.eval()
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step(loss=1.0)
    assert unchanged(before, snapshot(optimizer, params))
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step(lambda: pytest.fail("the loss at the wrong point was asked for"))
    more_steps(optimizer, params, at, [25])
    assert optimizer.param_groups[0]["step"] == 26


@both
def test_without_averaging_the_modes_do_nothing(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    optimizer.step(loss=backward())
    before = snapshot(optimizer, params)
    optimizer.eval()
    loss = backward()
    assert unchanged(before, snapshot(optimizer, params))
    optimizer.step(loss=loss)
    optimizer.train()
    assert "train_mode" not in optimizer.param_groups[0] and optimizer.trains


def test_the_modes_before_the_first_step_and_of_a_group_that_is_added():
    params, _ = least_squares()
    values = [p.detach().clone() for p in params]
    optimizer = MomoAdam(params[:1], averaging=True)
    optimizer.eval()
    optimizer.add_param_group({"params": params[1:]})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert all(map(torch.equal, params, values))


# ---- The state ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("clone", ["file", "deepcopy"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype, mode, clone, tmp_path):
    optimizer, params, at = trained(dtype)
    getattr(optimizer, mode)()
    if clone == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        torch.save((params, optimizer.state_dict()), tmp_path / "state.pt")
        others, state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = MomoAdam(others, lr=0.3, averaging=True)
        resumed.load_state_dict(state)
    assert resumed.trains == (mode == "train")
    for o, p in ((optimizer, params), (resumed, others)):
        more_steps(o, p, at, range(25, 40))
        o.eval()
    assert all(map(torch.equal, params, others))
    for key in ("gap_avg", "norm_avg", "tau_max", "weight_sum", "step"):
        assert torch.equal(optimizer.param_groups[0][key], resumed.param_groups[0][key])


def test_states_with_and_without_averaging_do_not_mix():
    params, _ = least_squares()
    one, other = MomoAdam(params), MomoAdam(params, averaging=True)
    for source, target in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=f"averaging={source.averages}"):
            target.load_state_dict(source.state_dict())


def test_the_share_of_the_average_is_saved_and_an_old_state_has_that_of_its_momentum():
    optimizer, params, at = trained(averaging=0.6)
    state = optimizer.state_dict()
    for saved, share in ((0.6, 0.6), (True, 0.9)):
        state["param_groups"][0]["averaging"] = saved
        resumed = MomoAdam(params, averaging=True)
        assert resumed.param_groups[0]["averaging"] == 0.7
        resumed.load_state_dict(state)
        assert resumed.param_groups[0]["averaging"] == share
        resumed.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert resumed.param_groups[1]["averaging"] == share
    optimizer.param_groups[0]["averaging"] = True
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["averaging"] == 0.9


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_goes_on_in_another_dtype(mode):
    for dtype, new in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        optimizer, params, at = trained(dtype)
        getattr(optimizer, mode)()
        others = [nn.Parameter(p.detach().to(new)) for p in params]
        resumed = MomoAdam(others, lr=0.3, averaging=True)
        resumed.load_state_dict(optimizer.state_dict())
        optimizer.train()
        resumed.train()
        for p, q in zip(params, others):
            torch.testing.assert_close(p.float(), q.float(), rtol=0.01, atol=1e-3)
        more_steps(resumed, others, at, range(25, 30))
        assert all(("y" in resumed.state[p]) == (new == torch.bfloat16) for p in others)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_distributed_checkpoint_finds_the_state_of_a_fresh_optimizer(mode):
    """It asks by a step with lr 0 and zero gradients; weights that are loaded afterwards are where training starts."""
    _, params, at = problem(dtype=torch.float32)
    fresh = MomoAdam(params, lr=0.0, averaging=True)
    getattr(fresh, mode)()
    for p in params:
        p.grad = torch.zeros_like(p)
    fresh.step(closure=None)
    assert fresh.trains == (mode == "train")
    optimizer, trained_params, _ = trained(steps=1)
    for p, q in zip(params, trained_params):
        assert fresh.state[p].keys() == optimizer.state[q].keys()
    assert fresh.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert fresh.param_groups[0]["step"] == 0
    for group in fresh.param_groups:
        group["lr"] = 0.3
    with torch.no_grad():
        for p in params:
            p.add_(3)
    loaded = [p.detach().clone() for p in params]
    fresh.eval()
    assert all(map(torch.equal, params, loaded))
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    other = MomoAdam(plain, lr=0.3, averaging=True)
    for o, ps in ((fresh, params), (other, plain)):
        more_steps(o, ps, at, range(3))
        o.eval()
    assert all(map(torch.equal, params, plain))
