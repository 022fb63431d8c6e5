"""What torch users expect of any optimizer: dtypes, odd parameters, groups, schedulers, copies and checkpoints."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.model import ModelState


METHODS = [Momo, MomoAdam]
both = pytest.mark.parametrize("cls", METHODS)


def least_squares(dtype=torch.float32, seed=0):
    """Parameters and a function that does forward and backward and returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator)
    target = inputs @ torch.randn(6, 2, generator=generator)
    weight = nn.Parameter(torch.randn(6, 2, generator=generator).to(dtype))
    bias = nn.Parameter(torch.zeros(2, dtype=dtype))

    def backward():
        for p in (weight, bias):
            p.grad = None
        loss = (inputs.to(dtype) @ weight + bias - target.to(dtype)).square().mean()
        loss.backward()
        return loss

    return [weight, bias], backward


def train(optimizer, backward, steps):
    return [float(optimizer.step(loss=backward().detach())) for _ in range(steps)]


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
        monkeypatch.setattr("momo_hf.optim.chunks.CPU_PIECE", size)
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
def test_tensor_lr_equals_a_number(cls):
    runs = []
    for lr in (0.05, torch.tensor(0.05), torch.tensor([0.05])):
        params, backward = least_squares()
        optimizer = cls(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(10):
            optimizer.step(loss=backward())
            scheduler.step()
        runs.append(params[0].detach())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-6)


TORCH_SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda k: 0.9**k},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.9},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20, "cycle_momentum": False},
    "ReduceLROnPlateau": {},
}


@both
@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
def test_torch_schedulers_own_the_cap(cls, name):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05, lb=-100.0)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **TORCH_SCHEDULERS[name])
    for _ in range(8):
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step(loss=backward())
        assert optimizer.param_groups[0]["lr"] == lr
        torch.testing.assert_close(float(optimizer.param_groups[0]["effective_lr"]), float(lr))
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))


@both
@pytest.mark.parametrize("name", [n.value for n in transformers.SchedulerType])
def test_transformers_schedulers_own_the_cap(cls, name):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05, lb=-100.0)
    special = {
        "cosine_with_min_lr": {"min_lr": 0.01},
        "cosine_warmup_with_min_lr": {"min_lr": 0.01},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }.get(name)
    scheduler = transformers.get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=special)
    for _ in range(8):
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step(loss=backward())
        torch.testing.assert_close(float(optimizer.param_groups[0]["effective_lr"]), float(lr))
        scheduler.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))


def test_one_cycle_may_cycle_the_momentum_of_momo_adam():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=80)
    losses = []
    for _ in range(80):
        losses.append(float(optimizer.step(loss=backward().detach())))
        scheduler.step()
    assert losses[-1] < 0.1 * losses[0]


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
@pytest.mark.parametrize("use_fstar", [False, True])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(cls, dtype, use_fstar):
    def fresh():
        params, backward = least_squares(dtype)
        groups = [{"params": [params[0]], "weight_decay": 0.01}, {"params": [params[1]], "lr": 0.02}]
        return params, backward, cls(groups, lr=0.05, use_fstar=use_fstar)

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
def test_a_warmup_from_zero_does_not_move(cls):
    params, backward = least_squares()
    start = params[0].detach().clone()
    optimizer = cls(params, lr=0.0)
    train(optimizer, backward, 2)
    assert torch.equal(params[0], start)
    assert optimizer.param_groups[0]["effective_lr"] == 0
    optimizer.param_groups[0]["lr"] = 0.1
    losses = train(optimizer, backward, 60)
    assert losses[-1] < 0.1 * losses[0]


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


def parameter():
    return [nn.Parameter(torch.ones(3))]


WRONG_ARGUMENTS = [
    (Momo, {"lr": -1.0}, "`lr`.*-1.0"),
    (Momo, {"lr": torch.ones(2)}, "`lr`.*one number"),
    (Momo, {"weight_decay": -0.1}, "`weight_decay`.*-0.1"),
    (Momo, {"beta": 1.0}, "`beta`.*1.0"),
    (Momo, {"lb": float("nan")}, "`lb`.*nan"),
    (MomoAdam, {"lb": float("-inf")}, "`lb`.*inf"),
    (MomoAdam, {"betas": (1.5, 0.9)}, r"`betas\[0\]`.*1.5"),
    (MomoAdam, {"betas": (0.9, 1.0)}, r"`betas\[1\]`.*1.0"),
    (MomoAdam, {"eps": -1e-8}, "`eps`.*-1e-08"),
]


@pytest.mark.parametrize("cls, options, message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(parameter(), **options)


def test_groups_share_one_model():
    with pytest.raises(ValueError, match="`lb` must be the same"):
        Momo([{"params": parameter()}, {"params": parameter(), "lb": 1.0}])


@both
def test_wrong_losses_are_named(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    loss = backward()
    with pytest.raises(RuntimeError, match=r"step\(loss=loss\).*set_loss"):
        optimizer.step()
    optimizer.step(loss=loss)
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"one element, got shape \(2,\)"):
        optimizer.step(loss=torch.ones(2))
    with pytest.raises(ValueError, match="on meta, but the parameters are on cpu"):
        optimizer.step(loss=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="`closure` or `loss`, got both"):
        optimizer.step(lambda: loss, loss=loss)


@both
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused(cls, kind):
    dtype = torch.complex64 if kind == "complex" else torch.float32
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = torch.ones(4).to_sparse() if kind == "sparse" else torch.ones(4, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"is {kind}"):
        cls([p]).step(loss=1.0)


@both
def test_checkpoints_of_other_methods_are_refused(cls):
    params, backward = least_squares()
    optimizer = cls(params)
    train(optimizer, backward, 1)
    adamw = torch.optim.AdamW(params)
    adamw.step()
    other = {Momo: MomoAdam, MomoAdam: Momo}[cls](params)
    train(other, backward, 1)
    for foreign in (adamw, other):
        with pytest.raises(ValueError, match=f"not saved by {cls.__name__}"):
            optimizer.load_state_dict(foreign.state_dict())


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


@both
def test_stalled_steps_are_counted(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, lb=1e6)
    train(optimizer, backward, 50)
    assert optimizer.param_groups[0]["stalled"] == 50 and optimizer.param_groups[0]["effective_lr"] == 0


@both
def test_scaling_the_gap_keeps_a_clipped_run_on_its_way(cls):
    """Consistent least squares, a large lr and gradients clipped far below their norm."""

    def run(tell):
        params, backward = least_squares(torch.float64)
        with torch.no_grad():
            params[0].mul_(100)
        optimizer = cls(params, lr=100.0)
        losses = []
        for _ in range(2000):
            loss = backward()
            norm = torch.nn.utils.clip_grad_norm_(params, 0.1)
            if tell:
                optimizer.set_clip_factor(0.1 / (norm + 1e-6))
            losses.append(float(optimizer.step(loss=loss.detach())))
        return losses[0], losses[-1]

    first, last = run(tell=True)
    assert last < 1e-6 * first
    first, last = run(tell=False)
    assert not last < 1e-6 * first


def test_no_warnings_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, backward = least_squares()
        train(MomoAdam(params), backward, 3)
