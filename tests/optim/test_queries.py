"""Asking an optimizer something changes nothing and says nothing; and states of earlier versions go on."""

import copy

import pytest
import torch
from torch import nn

from momo_hf.integrations.accelerate import momo_metrics
from momo_hf.optim import MomoAdam
from tests.averaging_reference import AveragingReference, close, give, problem, values
from tests.optim.problem import least_squares, train


def everything(optimizer):
    """All that an optimizer has, in copies."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = [dict(entry) for entry in optimizer.state.values()]
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((groups, state, params, optimizer._searching))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or (one.isnan() == other.isnan()).all()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("averaging", [False, True])
def test_a_query_writes_nothing_and_logs_nothing(averaging, caplog):
    params, backward = least_squares()
    optimizer = MomoAdam(params, lr="auto", averaging=averaging)
    for step in range(70):
        train(optimizer, backward, 1)
        said, before = len(caplog.records), everything(optimizer)
        ended = optimizer.search.cap is not None
        assert optimizer.searching == (not ended)
        optimizer.cap()
        optimizer.state_dict()
        momo_metrics(optimizer)
        assert equal(before, everything(optimizer)), step
        assert len(caplog.records) == said


def before_this_version(optimizer, mode):
    """A state as the version before saved it: z in the place of z - y."""
    state = copy.deepcopy(optimizer.state_dict())
    for key, p in zip(state["state"], [p for group in optimizer.param_groups for p in group["params"]]):
        entry = state["state"][key]
        ahead = entry.pop("ahead")
        if "y" in entry:
            entry["z"] = entry["y"] + ahead
        else:
            entry["z"] = p.detach() + (ahead if mode == "train" else ahead / optimizer.param_groups[0]["averaging"])
    return state


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_state_with_z_goes_on(mode, weights_first):
    start, params, at = problem()
    optimizer = MomoAdam(params, lr=0.3, averaging=True)
    reference = AveragingReference(start, [0] * 4, [0.3], [0.0])
    for step in range(30):
        if step == 12:
            getattr(optimizer, mode)()
            state, saved = before_this_version(optimizer, mode), [p.detach().clone() for p in params]
            params = [nn.Parameter(torch.randn_like(p)) for p in params]
            optimizer = MomoAdam(params, lr=0.3, averaging=True)
            for load in (0, 1) if weights_first else (1, 0):
                if load:
                    optimizer.load_state_dict(state)
                else:
                    for p, value in zip(params, saved):
                        p.data.copy_(value)
            optimizer.train()
        loss, grads = at(reference.y, step)
        give(params, grads)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        reference.step(loss, grads)
        assert close(values(params), reference.y, rtol=1e-8, atol=1e-10)
    assert set(optimizer.state[params[0]]) == {"ahead", "exp_avg_sq"}
