"""`lr="auto"` among schedules: once the cap is found, `lr` is the rate that any other optimizer would have."""

import functools

import diffusers.optimization
import pytest
import torch
import transformers
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares


STEPS = 90  # the search takes 41 or 60 of them


def sequence(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=30), lr_scheduler.CosineAnnealingLR(optimizer, 100)]
    return lr_scheduler.SequentialLR(optimizer, parts, [30])


def chain(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=70), lr_scheduler.ExponentialLR(optimizer, 0.99)]
    )


def named(get, name, **special):
    return lambda optimizer: get(name, optimizer, num_warmup_steps=20, num_training_steps=120, **special)


SPECIAL = {
    "cosine_with_min_lr": {"min_lr_rate": 0.3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.3},
    "warmup_stable_decay": {"num_decay_steps": 60},
    "polynomial": {"lr_end": 0.0},
    "greedy": {"min_lr": 0.0, "patience": 5},
}
NAMES = [name.value for name in transformers.SchedulerType]
DIFFUSERS = [name.value for name in diffusers.optimization.SchedulerType]
SCHEDULES = {
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda k: 0.99**k),
    "MultiplicativeLR": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda k: 0.99),
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=13, gamma=0.5),
    "MultiStepLR": functools.partial(lr_scheduler.MultiStepLR, milestones=[20, 70]),
    "ConstantLR": functools.partial(lr_scheduler.ConstantLR, total_iters=70),
    "LinearLR": functools.partial(lr_scheduler.LinearLR, total_iters=70),
    "ExponentialLR": functools.partial(lr_scheduler.ExponentialLR, gamma=0.97),
    "PolynomialLR": functools.partial(lr_scheduler.PolynomialLR, total_iters=100),
    "CosineAnnealingLR": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=100),
    "CosineAnnealingWarmRestarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=16, eta_min=1e-3),
    "ReduceLROnPlateau": functools.partial(lr_scheduler.ReduceLROnPlateau, factor=0.7, patience=7),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "SWALR": functools.partial(SWALR, swa_lr=0.0, anneal_epochs=100),
    "CyclicLR": functools.partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=20, cycle_momentum=False),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=100, cycle_momentum=False),
    **{f"transformers {n}": named(transformers.get_scheduler, n, scheduler_specific_kwargs=SPECIAL.get(n)) for n in NAMES},
    **{f"diffusers {n}": named(diffusers.optimization.get_scheduler, n) for n in DIFFUSERS if n != "piecewise_constant"},
    "diffusers piecewise_constant": named(diffusers.optimization.get_scheduler, "piecewise_constant", step_rules="1:20,0.1"),
}  # fmt: skip
METRIC = ("ReduceLROnPlateau", "transformers reduce_lr_on_plateau", "transformers greedy")


def rates(optimizer, make, name, step):
    """What schedule and groups say after every step."""
    scheduler, seen = make(optimizer), []
    optimizer._opt_called = True  # or torch warns of an optimizer that takes no steps
    for _ in range(STEPS):
        step()
        scheduler.step(*([1.0] if name in METRIC else []))
        seen.append((optimizer.param_groups[0]["lr"], scheduler.get_last_lr()[0]))
    return scheduler, seen


@both
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_over_the_cap_given_as_lr(cls, name):
    """Beside torch's SGD with this lr, and the same schedule from the start."""
    params, backward = least_squares()
    optimizer = cls(params, lr="auto")
    _, seen = rates(optimizer, SCHEDULES[name], name, lambda: optimizer.step(loss=backward()))
    given = optimizer.search is None
    cap, after = (0.05, 1) if given else (optimizer.search.cap, optimizer.search.steps + 1)
    sgd = torch.optim.SGD(params, lr=cap, momentum=0.9)
    _, expected = rates(sgd, SCHEDULES[name], name, lambda: None)
    assert seen[after:] == [(pytest.approx(a, rel=1e-4), pytest.approx(b, rel=1e-4)) for a, b in expected[after:]]
    assert given == (name in ("CyclicLR", "OneCycleLR"))


@pytest.mark.parametrize(
    "name, option",
    [("polynomial", "lr_end"), ("cosine_with_min_lr", "min_lr"), ("cosine_warmup_with_min_lr", "min_lr")],
)
def test_a_floor_that_is_computed_before_the_search_is_a_share_of_the_default(name, option):
    """transformers divides it by `optimizer.defaults["lr"]`, 1e-2 here, when the schedule is made."""
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    make = lambda floor: named(transformers.get_scheduler, name, scheduler_specific_kwargs={option: floor})  # noqa: E731
    _, seen = rates(optimizer, make(1e-3), name, lambda: optimizer.step(loss=backward()))
    cap = optimizer.search.cap
    _, expected = rates(torch.optim.SGD(params, lr=cap), make(0.1 * cap), name, lambda: None)
    assert seen[61:] == [(pytest.approx(a, rel=1e-6), pytest.approx(b, rel=1e-6)) for a, b in expected[61:]]


@both
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("averaging", [False, True])
def test_a_schedule_with_rates_is_taken_for_a_given_lr_and_that_is_said(cls, name, averaging, caplog):
    options = {"cycle_momentum": cls is MomoAdam}
    runs = []
    for lr in ("auto", 0.05):
        params, backward = least_squares()
        optimizer = cls(params, lr=lr, averaging=averaging)
        scheduler = SCHEDULES[name](optimizer, **options)
        for _ in range(20):
            optimizer.step(loss=backward())
            scheduler.step()
        runs.append(params[0].detach())
        assert optimizer.search is None
    assert torch.equal(*runs)
    (line,) = [r.message for r in caplog.records if r.name.startswith("momo_hf")]
    assert line.startswith(f"{name} gives learning rates of its own") and "none is searched for" in line


def test_a_rate_that_a_loop_writes_counts_after_the_search():
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto", lb=-100.0)
    for _ in range(130):
        optimizer.param_groups[0]["lr"] = 3e-4
        optimizer.step(loss=backward())
    assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(3e-4)


def schedule(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda k: 0.99**k)


# ---- Averaging ----


@both
@pytest.mark.parametrize("tensor", [False, True])
def test_with_averaging_the_largest_rate_so_far_counts_also_of_a_given_lr(cls, tensor):
    runs = []
    for follows in (False, True):
        params, backward = least_squares()
        optimizer = cls(params, lr=0.0, averaging=True)
        for k in range(40):
            warm = 0.05 * min(1.0, k / 10)
            lr = warm if follows or k < 20 else 0.05 * (1 - k / 40)
            lr = {25: float("nan"), 30: float("inf"), 35: -1.0}.get(k, lr)  # no rates: skipped, and forgotten
            optimizer.param_groups[0]["lr"] = torch.tensor(lr) if tensor else lr
            optimizer.step(loss=backward())
        runs.append(params[0].detach())
        assert optimizer.param_groups[0]["skipped"] == 3 and float(optimizer.cap()) == pytest.approx(0.05)
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


# ---- What is shown ----


@both
@pytest.mark.parametrize("lr", [0.05, "auto"])
def test_the_cap_that_is_shown_is_that_of_the_step_that_was_taken(cls, lr):
    """Also where the schedule has gone on since, and the last step was dropped."""
    params, backward = least_squares()
    optimizer = cls(params, lr=lr, lb=-100.0)  # so that the cap decides
    scheduler = schedule(optimizer)
    for k in range(90):
        optimizer.step(loss=backward() if k not in (70, 71) else float("nan"))
        scheduler.step()
        assert float(optimizer.cap()) == pytest.approx(float(optimizer.param_groups[0]["effective_lr"]), rel=1e-6)


def test_a_schedule_that_torch_did_not_make_is_pointed_out(caplog):
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto")
    optimizer.param_groups[0]["initial_lr"] = 1e-2  # as timm's do
    for _ in range(65):
        optimizer.step(loss=backward())
    (line,) = [r.message for r in caplog.records if "none of torch's" in r.message]
    assert "began with lr=0.01" in line and "found, 0.157" in line
