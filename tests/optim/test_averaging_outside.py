"""What something else does to parameters whose iterates are averaged. Expected weights come from the NumPy version, which stores
all three sequences and is done the same to."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from momo_hf.optim import MomoAdam
from tests.averaging_reference import GROUPS, AveragingReference, close, give, in_groups, problem, values, z_of
from tests.optim.problem import least_squares


LRS, DECAYS = [0.3, 0.1], [0.0, 0.02]


class Pair:
    """An optimizer and the NumPy version, on the same noisy problem."""

    def __init__(self, dtype=torch.float64):
        start, self.params, self.at = problem(dtype=dtype)
        self.optimizer = MomoAdam(in_groups(self.params, LRS, DECAYS), averaging=True)
        self.reference = AveragingReference(start, GROUPS, LRS, DECAYS)
        self.step = 0

    def train(self, steps, between=lambda: None):
        self.optimizer.train()
        for _ in range(steps):
            loss, grads = self.at(self.reference.y, self.step)
            own_loss, own_grads = self.at([p.detach().double().numpy() for p in self.params], self.step)
            self.reference.step(loss, grads)
            give(self.params, own_grads)
            self.optimizer.step(loss=own_loss)
            between()
            self.step += 1

    def begin(self, start):
        """In NumPy, what is averaged begins there; moments and counts go on."""
        for i, value in start.items():
            self.reference.z[i], self.reference.x[i] = value.copy(), value.copy()
        if len(start) == len(self.params):
            self.reference.gap = self.reference.q = self.reference.largest = 0.0
            self.reference.weights = []

    def agree(self, rtol=1e-10, atol=1e-11):
        self.optimizer.eval()
        assert close(values(self.params), self.reference.x, rtol, atol)
        self.optimizer.train()
        assert close([z_of(self.optimizer, p) for p in self.params], self.reference.z, rtol, atol)
        assert close(values(self.params), self.reference.y, rtol, atol)
        return True


@torch.no_grad()
def write(params, arrays):
    for p, array in zip(params, arrays):
        p.copy_(torch.as_tensor(array))


# ---- In train mode ----


def test_z_and_x_take_the_change_of_y_and_its_zeros():
    pair = Pair()
    mask = (np.arange(60).reshape(20, 3) % 4 > 0).astype(float)

    @torch.no_grad()
    def between():
        pair.params[1].add_(0.01)  # all three are moved
        pair.params[0].mul_(torch.as_tensor(mask))
        for points in (pair.reference.z, pair.reference.x):
            points[1] = points[1] + 0.01
            points[0] = points[0] * mask

    pair.train(12, between)
    assert pair.agree()
    assert not pair.params[0][torch.as_tensor(mask) == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_too(dtype):
    """There y is stored apart from the parameter, and the next step would write it over what was done."""
    runs = []
    for added in (0.0, 0.125):
        p, generator = nn.Parameter(torch.ones(64, dtype=dtype)), torch.Generator().manual_seed(0)
        optimizer = MomoAdam([p], lr=0.01, averaging=True)
        for _ in range(10):
            p.grad = torch.randn(64, generator=generator).to(dtype)
            optimizer.step(loss=1.0)
            with torch.no_grad():
                p.add_(added)
                p[::2] = 0.0
        y = p.detach().double()
        optimizer.eval()
        runs.append((y, p.detach().double()))
    for before, after in zip(*runs):
        assert not after[::2].any() and not before[::2].any()
        # Once rounded where they are added, and once where they are held.
        torch.testing.assert_close((after - before)[1::2], torch.full_like(after[1::2], 1.25), rtol=0, atol=0.05)


def test_a_mask_that_follows_the_last_step_is_in_what_is_evaluated():
    pair = Pair()
    pair.train(5)
    with torch.no_grad():
        pair.params[0][3] = 0.0
    pair.optimizer.eval()
    assert not pair.params[0][3].any() and pair.params[0][4].all()


# ---- In eval mode ----


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 2e-4), (torch.bfloat16, 0.1)])
def test_training_begins_at_weights_that_were_loaded_in_eval_mode(dtype, rtol):
    pair = Pair(dtype)
    pair.train(10)
    pair.optimizer.eval()
    start = [np.asarray(value, dtype=np.float32) for value in problem(seed=5)[0]]
    write(pair.params, start)
    given = [p.detach().clone() for p in pair.params]
    pair.begin(dict(enumerate(p.double().numpy() for p in given)))
    pair.optimizer.train()
    assert all(map(torch.equal, pair.params, given))
    pair.train(1)
    assert close([z_of(pair.optimizer, p) for p in pair.params], pair.reference.z, rtol, rtol)
    if dtype != torch.bfloat16:
        pair.train(7)
        assert pair.agree(rtol, rtol)


def test_a_part_that_was_loaded_begins_anew_alone():
    pair = Pair()
    pair.train(10)
    pair.optimizer.eval()
    new = {1: problem(seed=5)[0][1]}
    write([pair.params[1]], new.values())
    pair.begin(new)
    pair.train(6)
    assert pair.agree()


@torch.no_grad()
def swapped(params):
    """As an EMA does for an evaluation."""
    held = [p.clone() for p in params]
    for p, value in zip(params, held):
        p.zero_()
        p.copy_(value)


def moved(params):
    for p in params:
        p.data = p.data.clone()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("change", [swapped, moved])
def test_values_that_are_what_they_were_change_nothing(mode, change):
    runs = []
    for changes in (False, True):
        pair = Pair(torch.float32)
        for _ in range(4):
            pair.train(3)
            getattr(pair.optimizer, mode)()
            if changes:
                change(pair.params)
        pair.train(3)
        runs.append(pair)
    assert all(map(torch.equal, *(pair.params for pair in runs)))
    for p, q in zip(*(pair.params for pair in runs)):
        assert torch.equal(runs[0].optimizer.state[p]["ahead"], runs[1].optimizer.state[q]["ahead"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_search_goes_back_to_weights_that_were_loaded_in_eval_mode(dtype):
    params, backward = least_squares(dtype)
    optimizer = MomoAdam(params, lr="auto", averaging=True)
    start = [torch.full_like(p, 0.25) for p in params]
    for k in range(61):
        if k == 5:
            optimizer.eval()
            write(params, start)
            optimizer.train()
        loss = backward().detach()
        if not optimizer.searching:
            break
        optimizer.step(loss=loss)
    assert optimizer.search.steps < 61
    assert all(map(torch.equal, params, start))
    optimizer.step(loss=loss)
    assert optimizer.param_groups[0]["step"] == 1


# ---- What is said ----


def clamped(params):
    for p in params:
        p.clamp_(-0.5, 0.5)


def clamped_in_part(params):
    params[1].clamp_(-0.01, 0.01)


def masked(params):
    params[0][:3] = 0.0
    params[1].masked_fill_(torch.zeros_like(params[1], dtype=torch.bool), 0.0)  # of nothing


def doubled_late(params, count=[0]):  # noqa: B006 - it counts
    count[0] += 1
    params[1].add_(0.0 if count[0] < 5 else 0.1)


@pytest.mark.parametrize(
    "change, name",
    [
        (clamped, "number 0 of group 0, shape (20, 3)"),
        (clamped_in_part, "number 1 of group 0, shape (7,)"),
        (doubled_late, "number 1 of group 0, shape (7,)"),
        (masked, None),
        (moved, None),
        (lambda params: None, None),
    ],
)
def test_what_the_average_cannot_follow_is_said_once(change, name, caplog):
    caplog.set_level(logging.WARNING)
    pair = Pair()
    pair.train(8, torch.no_grad()(lambda: change(pair.params)))
    said = [record.getMessage() for record in caplog.records if "Something other" in record.getMessage()]
    assert len(said) == (name is not None)
    assert name is None or name in said[0]


def test_names_are_said_where_the_optimizer_has_them(caplog):
    named = [("head.weight", nn.Parameter(torch.ones(2))), ("head.bias", nn.Parameter(torch.ones(1)))]
    optimizer = MomoAdam(named, averaging=True)
    for _ in range(2):
        for _, p in named:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        with torch.no_grad():
            for _, p in named:
                p.add_(1.0)
    assert "head.weight, shape (2,)" in caplog.text
