"""Schedulers own a cap that was given, and the optimizer never writes it; for one that is found see `test_auto`."""

import copy

import pytest
import torch
import transformers

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares, train


def torch_schedules(lr):
    """Whether torch's own optimizers go with this kind of lr: in 2.6 a tensor must have no dimensions."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=copy.deepcopy(lr), foreach=False)
    try:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
        sgd.step()
        scheduler.step()
    except RuntimeError:
        return False
    return True


@both
def test_tensor_lr_equals_a_number(cls):
    runs = []
    for lr in filter(torch_schedules, (0.05, torch.tensor(0.05), torch.tensor([0.05]))):
        params, backward = least_squares()
        optimizer = cls(params, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(10):
            optimizer.step(loss=backward())
            scheduler.step()
        runs.append(params[0].detach())
    assert len(runs) >= 2
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
