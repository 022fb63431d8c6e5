"""Random histories of an optimizer that averages, with and without a search, beside a float64 version in NumPy.

Schedules, clips, losses and gradients that are no numbers; parameters that are late, absent, 0-dim or strided; modes, saved
states, copies, state that is taken away, and weights that something else writes to.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.history_reference import History


SHAPES, GROUPS = [(6, 3), (4,), (), (3, 5)], [0, 0, 1, 1]
SAVED = ("file", "deepcopy", "pickle")
BAD = ("nan loss", "inf loss", "nan gradient", "inf gradient", "nan clip", "negative clip")
WHAT = (*BAD, "clip", "large clip", "modes", *SAVED, "shift", "absent", "alone", "look", "part", "empty")


def leaf(value, strided):
    array = np.ascontiguousarray(value.T) if strided else value
    return nn.Parameter(torch.tensor(array).t() if strided else torch.tensor(array))


class Run:
    """An optimizer, its parameters and what they should be."""

    def __init__(self, cls, auto, seed, late, decays, interpolation, divide, lb, foreach):
        self.noise = np.random.default_rng(seed)
        start = [np.asarray(self.noise.standard_normal(shape)) for shape in SHAPES]
        self.target = [np.asarray(self.noise.standard_normal(shape)) for shape in SHAPES]
        self.params = [leaf(p, strided=p.shape == (3, 5)) for p in start]
        self.late, self.auto, adam = late, auto, cls is MomoAdam
        self.lrs = [0.3, 0.1] if adam else [30.0, 10.0]
        self.make = lambda params: self.built(cls, params, decays, averaging=interpolation, lb=lb, foreach=foreach)
        self.divide, beta2 = divide, 0.999 if adam else None
        self.optimizer = self.make(self.params)
        self.right = History(start, GROUPS, decays, auto, adam, beta2, interpolation, lb, divide)

    def built(self, cls, params, decays, **options):
        groups = [{"params": [p for p, g in zip(params, GROUPS) if g == i], "weight_decay": decays[i]} for i in (0, 1)]
        optimizer = cls(groups, lr="auto" if self.auto else 1.0, **options)
        for group in optimizer.param_groups:
            group["divide"] = self.divide
        return optimizer

    def step(self, number, what, which):
        """One step, and before it what happens to the optimizer."""
        self.happen(what, which)
        scale = min(number / 5, 1.0)
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            if not self.auto:
                group["lr"] = scale * lr
        errors = [y - t + 0.3 * self.noise.standard_normal(np.shape(t)) for y, t in zip(self.right.y, self.target)]
        loss, grads = 0.05 + sum(np.sum(e * e) for e in errors) / 100, [e / 50 for e in errors]
        for i, first in enumerate(self.late):
            if number < first or what == "absent" and i == which or what == "alone" and i not in (0, which):
                grads[i] = None
        kappa = {"clip": 0.25, "large clip": 3.0, "nan clip": np.nan, "negative clip": -0.5}.get(what, 1.0)
        loss = {"nan loss": np.nan, "inf loss": np.inf}.get(what, loss)
        if what == "clip":
            grads = [None if g is None else 0.25 * g for g in grads]
        if what in ("nan gradient", "inf gradient"):
            grads[0] = np.where(np.arange(18).reshape(6, 3) == 7, np.nan if what[0] == "n" else np.inf, grads[0])
        for p, g in zip(self.params, grads):
            p.grad = None if g is None else torch.tensor(np.array(g))
        if kappa != 1:
            self.optimizer.set_clip_factor(kappa)
        self.optimizer.step(loss=float(loss))
        self.right.step(loss, grads, kappa, [scale * lr for lr in self.lrs])

    def happen(self, what, which):
        optimizer, p = self.optimizer, self.params[which]
        if what == "modes":
            optimizer.eval()
            self.check(self.right.x)
            optimizer.train()
        elif what == "file":
            values, file = [q.detach().clone() for q in self.params], io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            self.params = [nn.Parameter(v) for v in values]
            self.optimizer = self.make(self.params)
            self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        elif what == "deepcopy":
            self.params, self.optimizer = copy.deepcopy((self.params, optimizer))
        elif what == "pickle":
            self.params, self.optimizer = pickle.loads(pickle.dumps((self.params, optimizer)))
        elif what == "look":
            optimizer.state[p]
        elif what == "empty":
            optimizer.state.clear()
            self.right.begin(self.right.y)
        elif what == "part" and p in optimizer.state:
            del optimizer.state[p]
            self.right.forget(which)
        elif what == "shift":
            by = 0.1 * self.noise.standard_normal(SHAPES[which])
            with torch.no_grad():
                p.add_(torch.tensor(by))
            self.right.shift(which, by)

    def check(self, values):
        for p, value in zip(self.params, values, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-8, atol=1e-10)

    def check_step(self):
        right, optimizer = self.right, self.optimizer
        self.check(right.y)
        assert float(optimizer.param_groups[0]["skipped"]) == right.skipped
        assert optimizer.searching == right.searching
        if not right.searching:
            assert float(optimizer.param_groups[0]["step"]) == right.average.k
            if right.average.k:
                assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(right.tau, rel=1e-8)
            if right.auto:
                assert optimizer.search.cap == pytest.approx(right.cap, rel=1e-8)


@settings(max_examples=20, deadline=None)
@given(
    cls=st.sampled_from([Momo, MomoAdam]),
    auto=st.booleans(),
    seed=st.integers(0, 10**6),
    late=st.tuples(st.just(0), *[st.sampled_from([0, 0, 1, 7, 66])] * 3),
    decays=st.sampled_from([[0.0, 0.0], [0.01, 0.0], [0.01, 0.1]]),
    interpolation=st.sampled_from([0.7, 0.5]),
    divide=st.booleans(),
    lb=st.sampled_from([0.0, 0.04]),
    foreach=st.sampled_from([None, False]),
    events=st.dictionaries(
        st.integers(0, 79), st.tuples(st.sampled_from(WHAT), st.integers(0, 3)), max_size=12
    ),
)  # fmt: skip
def test_any_history(cls, auto, seed, late, decays, interpolation, divide, lb, foreach, events):
    run = Run(cls, auto, seed, late, decays, interpolation, divide, lb, foreach)
    if not auto:  # there is no search to wait for
        events = {number // 3: event for number, event in events.items()}
    for number in range(80 if auto else 27):
        run.step(number, *events.get(number, ("", 0)))
        run.check_step()
