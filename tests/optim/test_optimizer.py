"""What torch users expect of any optimizer: dtypes, odd parameters, groups, forms of the loss, copies and checkpoints."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam
from momo_hf.optim.steps.model import ModelState
from tests.optim.problem import both, least_squares, train


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_trains_and_scalars_stay_wide(cls, dtype):
    params, backward = least_squares(dtype)
    optimizer = cls(params, lr=0.1)
    losses = train(optimizer, backward, 100)
    assert losses[-1] < 0.05 * losses[0]
    wide = torch.promote_types(dtype, torch.float32)
    for group in optimizer.param_groups:
        assert {group[name].dtype for name in ModelState._fields} == {wide}
    for p in params:
        assert p.dtype == dtype
        assert {value.dtype for value in optimizer.state[p].values()} == {wide}


@both
def test_half_precision_follows_double(cls):
    runs = []
    for dtype in (torch.float64, torch.bfloat16):
        params, backward = least_squares(dtype)
        optimizer = cls(params, lr=0.05)
        train(optimizer, backward, 5)
        runs.append(params[0].detach().double())
    torch.testing.assert_close(runs[1], runs[0], rtol=0.02, atol=0.02)


@both
def test_odd_parameters(cls):
    """Missing gradients, frozen, empty, non-contiguous and 0-dim parameters step like an ordinary copy of them."""
    torch.manual_seed(0)
    values = {
        "plain": torch.randn(4, 3),
        "strided": torch.randn(3, 5),
        "scalar": torch.randn(()),
        "empty": torch.ones(0),
    }
    grads = {name: torch.randn_like(value) for name, value in values.items()}
    odd = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    odd["strided"] = nn.Parameter(values["strided"].t().contiguous().t())
    odd["frozen"], odd["unused"] = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    flat = nn.Parameter(torch.cat([value.reshape(-1) for value in values.values()]))
    ours, reference = cls(odd.values(), lr=0.1, weight_decay=0.1), cls([flat], lr=0.1, weight_decay=0.1)
    assert not odd["strided"].is_contiguous()
    for step in range(4):
        for name, grad in grads.items():
            odd[name].grad = torch.empty_like(odd[name]).copy_(grad * (step + 1))
        flat.grad = torch.cat([(grad * (step + 1)).reshape(-1) for grad in grads.values()])
        ours.step(loss=2.0)
        reference.step(loss=2.0)
    torch.testing.assert_close(torch.cat([odd[name].detach().reshape(-1) for name in values]), flat.detach())
    assert torch.equal(odd["frozen"], torch.ones(2)) and torch.equal(odd["unused"], torch.ones(2))
    assert odd["unused"] not in ours.state and odd["frozen"] not in ours.state


@both
def test_large_tensors_in_pieces_and_small_ones_packed_are_the_same(cls, monkeypatch):
    runs = []
    for size, foreach in [(1 << 17, None), (7, None), (5, False)]:
        monkeypatch.setattr("momo_hf.optim.tensors.chunks.CPU_PIECE", size)
        params, backward = least_squares(torch.float64)
        train(cls(params, lr=0.1, weight_decay=0.01, foreach=foreach), backward, 20)
        runs.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-12, atol=1e-12)


@both
def test_many_groups_with_equal_options_are_one_group(cls):
    runs = []
    for split in (False, True):
        params, backward = least_squares(torch.float64)
        groups = [{"params": [p]} for p in params] if split else params
        train(cls(groups, lr=0.1, weight_decay=0.01), backward, 20)
        runs.append(params[0].detach())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-12)


@both
def test_a_group_added_later_joins_the_running_model(cls):
    params, backward = least_squares()
    optimizer = cls(params[:1], lr=0.1)
    train(optimizer, backward, 3)
    optimizer.add_param_group({"params": params[1:], "lr": 0.05})
    assert optimizer.param_groups[1]["step"] == 3
    assert optimizer.param_groups[1]["loss_avg"] == optimizer.param_groups[0]["loss_avg"]
    losses = train(optimizer, backward, 60)
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.param_groups[1]["step"] == 63


@both
def test_a_group_that_names_no_shared_option_has_that_of_the_others(cls):
    params, _ = least_squares()
    optimizer = cls(params[:1], lr=0.1)
    optimizer.set_lb(0.5)
    optimizer.add_param_group({"params": params[1:]})
    assert [group["lb"] for group in optimizer.param_groups] == [0.5, 0.5]


@both
def test_a_copy_of_a_group_shares_no_scalars(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    train(optimizer, backward, 5)
    others, others_backward = least_squares()
    second = cls([{**optimizer.param_groups[0], "params": others}], lr=0.1)
    assert (second.param_groups[0]["step"], optimizer.param_groups[0]["step"]) == (0, 5)
    train(second, others_backward, 2)
    assert (second.param_groups[0]["step"], optimizer.param_groups[0]["step"]) == (2, 5)

    params, backward = least_squares()
    optimizer = cls(params[:1], lr=1e-3)
    train(optimizer, backward, 1)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params[1:], "lr": 1e-4})
    train(optimizer, backward, 1)
    first, late = (float(group["effective_lr"]) for group in optimizer.param_groups)
    assert late == pytest.approx(first / 10) and first > 0


@both
def test_deepcopy_and_pickle_continue_alike(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05)
    train(optimizer, backward, 5)
    both_params, clone = copy.deepcopy((params, optimizer))
    loaded_params, loaded = pickle.loads(pickle.dumps((params, optimizer)))
    for p in params:
        p.grad = torch.ones_like(p)
    for copies in (both_params, loaded_params):
        for p in copies:
            p.grad = torch.ones_like(p)
    for o in (optimizer, clone, loaded):
        o.step(loss=1.0)
    assert torch.equal(params[0], both_params[0]) and torch.equal(params[0], loaded_params[0])


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_fstar": True}])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(cls, dtype, options):
    def fresh():
        params, backward = least_squares(dtype)
        groups = [{"params": [params[0]], "weight_decay": 0.01}, {"params": [params[1]], "lr": 0.02}]
        return params, backward, cls(groups, lr=0.05, **options)

    params, backward, optimizer = fresh()
    train(optimizer, backward, 7)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    train(optimizer, backward, 7)

    resumed_params, resumed_backward, resumed = fresh()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, q in zip(resumed_params, saved["params"]):
            p.copy_(q)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, resumed_backward, 7)
    for p, q in zip(params, resumed_params):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][name]) and value.dtype == resumed.state[q][name].dtype
    for name in ModelState._fields:
        assert torch.equal(optimizer.param_groups[1][name], resumed.param_groups[1][name])


@both
def test_loss_may_come_in_any_form(cls):
    runs = []
    for form in (
        lambda x: x,
        lambda x: x.item(),
        lambda x: x.reshape(1, 1),
        lambda x: x.double(),
        "closure",
        "set_loss",
    ):
        params, backward = least_squares()
        optimizer = cls(params, lr=0.05)
        for _ in range(3):
            if form == "closure":
                assert optimizer.step(backward).requires_grad
            elif form == "set_loss":
                optimizer.set_loss(backward())
                optimizer.step()
            else:
                optimizer.step(loss=form(backward()))
        runs.append(params[0].detach())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])


@both
@pytest.mark.parametrize("bad", ["loss", "grad"])
def test_non_finite_values_change_nothing_but_the_count(cls, bad):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05, weight_decay=0.1)
    train(optimizer, backward, 3)
    before = copy.deepcopy((params, optimizer.state_dict()))
    loss = backward().detach()
    if bad == "loss":
        loss = loss * float("nan")
    else:
        params[1].grad[0] = float("inf")
    optimizer.step(loss=loss)
    after = (params, optimizer.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(before[0], after[0]))
    for key, entry in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][key][name]) for name, value in entry.items())
    for name in ModelState._fields:
        old, new = (x[1]["param_groups"][0][name] for x in (before, after))
        assert new == old + 1 if name == "skipped" else torch.equal(new, old)
    train(optimizer, backward, 1)
    assert optimizer.param_groups[0]["skipped"] == 1 and optimizer.param_groups[0]["step"] == 4


@both
def test_a_state_probe_makes_state_and_nothing_else(cls):
    """torch.distributed.checkpoint asks for state by a step with lr 0 and zero gradients."""
    params, _ = least_squares()
    start = params[0].detach().clone()
    optimizer = cls(params, lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert torch.equal(params[0], start) and optimizer.param_groups[0]["step"] == 0
    assert all(not value.any() for p in params for value in optimizer.state[p].values())
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()


def test_no_warnings_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, backward = least_squares()
        train(MomoAdam(params), backward, 3)
