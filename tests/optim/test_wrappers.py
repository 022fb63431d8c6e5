"""What torch has around optimizers and models: each right, or refused before the first step.

| wrapper | |
|---|---|
| `ZeroRedundancyOptimizer` on several processes | refused where it is built |
| `PostLocalSGDOptimizer`, its loss by `set_loss` | right; without a loss refused |
| `_NamedOptimizer`, its loss by a closure | right, with `init_state` and its saved state; without a loss refused |
| `DistributedOptimizer`, `_apply_optimizer_in_backward` | refused: nobody can give a loss |
| `swa_utils.AveragedModel`, `SWALR`, wrappers with the groups of their optimizer (torchcontrib's SWA, Lookahead) | right |
"""

from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import (
    PostLocalSGDOptimizer,
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
    _NamedOptimizer,
)
from torch.distributed.optim import optimizer as remote
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from momo_hf.optim import MomoAdam
from tests.optim.problem import both, least_squares, train


@pytest.fixture
def processes():
    """Starts a process group in this process alone."""
    yield lambda backend, store, size: dist.init_process_group(backend, store=store, rank=0, world_size=size)
    dist.destroy_process_group()


def same_runs(wrapped, params, backward, steps=8, lr=10.0, cls=MomoAdam):
    """Whether a wrapped optimizer makes of its parameters what a bare one makes of others."""
    others, again = least_squares()
    bare = cls(others, lr=lr)
    for _ in range(steps):
        wrapped(backward)
        train(bare, again, 1)
    assert float(bare.param_groups[0]["effective_lr"]) < lr  # the loss decides
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-7)


@both
def test_an_optimizer_in_parts_is_refused_where_it_is_built(cls, processes):
    processes("fake", FakeStore(), 2)
    params, _ = least_squares()
    with pytest.raises(
        RuntimeError, match=rf"of the 2 processes.*fully_shard.*build {cls.__name__} of all parameters"
    ):
        ZeroRedundancyOptimizer(params, optimizer_class=cls, lr=1.0)
    cls(params)


def test_one_part_is_the_whole(processes):
    processes("gloo", dist.HashStore(), 1)
    params, backward = least_squares()
    zero = ZeroRedundancyOptimizer(params, optimizer_class=MomoAdam, lr=10.0)
    same_runs(lambda backward: zero.step(loss=backward().detach()), params, backward)


def test_local_sgd_takes_a_loss_that_is_set(processes):
    processes("gloo", dist.HashStore(), 1)
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr=10.0)
    wrapper = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2, warmup_steps=1))
    backward()
    with pytest.raises(RuntimeError, match="needs the loss"):
        wrapper.step()

    def step(backward):
        optimizer.set_loss(backward().detach())
        wrapper.step()

    same_runs(step, params, backward)
    wrapper.load_state_dict(wrapper.state_dict())


def test_named_parameters_take_a_closure_and_state_that_is_asked_for():
    params, backward = least_squares()
    named = _NamedOptimizer(dict(zip("wb", params)), MomoAdam, lr=10.0)
    backward()
    with pytest.raises(RuntimeError, match="needs the loss"):
        named.step()
    same_runs(named.step, params, backward, steps=5)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = _NamedOptimizer(dict(zip("wb", others)), MomoAdam, lr=10.0)
    fresh.init_state()
    assert all(map(torch.equal, params, others))
    fresh.load_state_dict(named.state_dict())
    for p, q in zip(params, others):
        p.grad = q.grad = torch.sin(p.detach())
    for optimizer in (named, fresh):
        optimizer.step(lambda: torch.tensor(1.0))
    assert all(map(torch.equal, params, others))


def test_who_cannot_be_given_a_loss_is_refused(monkeypatch):
    model = nn.Linear(3, 1)
    before = [p.detach().clone() for p in model.parameters()]
    _apply_optimizer_in_backward(MomoAdam, model.parameters(), {"lr": 0.1})
    with pytest.raises(RuntimeError, match="needs the loss"):
        model(torch.ones(2, 3)).sum().backward()
    p = nn.Parameter(torch.ones(3))
    monkeypatch.setattr(remote.dist_autograd, "get_gradients", lambda context: {p: torch.ones(3)}, raising=False)

    class Reference:
        local_value = staticmethod(lambda: p)

    with pytest.raises(RuntimeError, match="needs the loss"):
        remote._LocalOptimizer(MomoAdam, [Reference()], lr=0.1).step(1)
    assert torch.equal(p, torch.ones(3)) and all(map(torch.equal, model.parameters(), before))


def test_an_averaged_model_and_its_schedule():
    """The schedule moves the bound, and the copy is the mean of what the parameters were."""
    params, backward = least_squares()
    model = nn.ParameterList(params)
    averaged, optimizer = AveragedModel(model), MomoAdam(params, lr=1e-2, lb=-1e6)
    schedule = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=4, anneal_strategy="linear")
    seen, bounds = [], []
    for _ in range(6):
        train(optimizer, backward, 1)
        bounds.append(float(optimizer.param_groups[0]["effective_lr"]))
        averaged.update_parameters(model)
        schedule.step()
        seen.append([p.detach().clone() for p in params])
    torch.testing.assert_close(
        list(averaged.module), [nn.Parameter(torch.stack(v).mean(0)) for v in zip(*seen)], rtol=1e-5, atol=1e-6
    )
    assert bounds == pytest.approx([1e-2 - 9e-3 * min(k / 4, 1) for k in range(6)])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["swa_lr"] == 1e-3


def test_a_wrapper_that_shares_the_groups_and_swaps_the_weights():
    """As torchcontrib's SWA: the weights are set to their mean between two steps."""

    class SWA(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, defaultdict(dict)

        def step(self, closure):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("mean", p.detach().clone())
            return self.optimizer.step(closure)

        @torch.no_grad()
        def swap(self):
            for p in self.param_groups[0]["params"]:
                mean = self.state[p]["mean"]
                self.state[p]["mean"] = p.detach().clone()
                p.copy_(mean)

    params, backward = least_squares()
    wrapper = SWA(MomoAdam(params, lr=10.0))

    def step(backward):
        wrapper.step(backward)
        wrapper.swap()
        wrapper.swap()

    same_runs(step, params, backward)
