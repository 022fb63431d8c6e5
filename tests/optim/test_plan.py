"""What a step remembers of the one before: nothing that has changed, and no gradient."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from momo_hf.optim import MomoAdam, MomoMuon
from momo_hf.optim.kernels import lists
from momo_hf.optim.kernels.lists import Division
from momo_hf.optim.steps import plan
from momo_hf.optim.tensors.sharding import whole
from tests.optim.simulated_device import Device, device


__all__ = ["device"]  # a fixture


def parameters():
    return [
        nn.Parameter(torch.linspace(-1, 1, 24).roll(i).view(shape))
        for i, shape in enumerate([(4, 6), (24,), (2, 12), (24,)])
    ]


def made(options):
    first, *others, last = parameters()
    groups = [{"params": [first]}, {"params": others, "eps": 1e-7}, {"params": [last]}]
    return MomoAdam(groups, **{"lr": 0.1, **options})


def exchange_data(optimizer):
    p = optimizer.param_groups[1]["params"][1]
    p.data = p.data.clone()


def exchange_state(optimizer):
    for entry in optimizer.state.values():
        entry["exp_avg_sq"] = entry["exp_avg_sq"].clone() / 2


def exchange_parameter(change):
    def exchange(optimizer):
        params = optimizer.param_groups[1]["params"]
        old, new = params[1], nn.Parameter(change(params[1].detach()))
        entries = [(new if p is old else p, entry) for p, entry in optimizer.state.items()]
        optimizer.state.clear()
        optimizer.state.update(entries)
        params[1] = new

    return exchange


def transpose(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.clone().reshape(6, 4).t()


def forget_one(optimizer):
    optimizer.state.pop(optimizer.param_groups[1]["params"][0], None)


def load(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def join(optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.full((5,), float(len(optimizer.param_groups))))]})


def change(group, **options):
    return lambda optimizer: optimizer.param_groups[group].update(options)


EVENTS = {
    "nothing": lambda optimizer: None,
    "another lr": change(0, lr=0.05),
    "the same lr": change(0, lr=0.1),
    "other betas": change(1, betas=(0.9, 0.9)),
    "another eps": change(0, eps=1e-4),
    "decay": change(0, weight_decay=0.1),
    "no decay": change(0, weight_decay=0.0),
    "tables": change(1, tables=[1]),
    "data": exchange_data,
    "state": exchange_state,
    "parameter": exchange_parameter(lambda p: p + 0.5),
    "parameter of the same memory": exchange_parameter(lambda p: p),
    "transposed": transpose,
    "forgotten": forget_one,
    "loaded": load,
    "joined": join,
}


OPTIONS = [{}, {"averaging": True}, {"lr": "auto"}]
Events = list[tuple[str, int | None]]


def after(options, events: Events, remembers: bool):
    """Parameters and state after as many steps as there are events, each before a step, some parameters without a gradient."""
    optimizer = made(options)
    for number, (event, without) in enumerate(events):
        EVENTS[event](optimizer)
        for group in optimizer.param_groups:
            for place, p in enumerate(group["params"]):
                p.grad = None if place == without else 10.0**number * torch.sin(p.detach() + number)
        if not remembers:
            for kind in (optimizer._modelled, optimizer._averaged, optimizer._ramp):
                kind.plan = None
        optimizer.step(loss=torch.tensor(5.0 - 0.1 * number))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


def check(options, events: Events):
    for ours, theirs in zip(after(options, events, True), after(options, events, False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_between_two_steps_counts(event, options):
    before, later = 2 * [("nothing", None)], 3 * [("nothing", None)]
    check(options, [*before, (event, None), *later, ("nothing", 0)])


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(events=st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from([None, None, 0, 1])), max_size=8))
def test_whatever_happens_between_steps_counts(options, events):
    check(options, events)


def test_a_plan_is_made_once_where_nothing_changes_but_the_lr(monkeypatch):
    made_plans = []
    assign = plan.assign
    monkeypatch.setattr(plan, "assign", lambda *given: made_plans.append(given) or assign(*given))
    optimizer = made({})
    for number in range(4):
        optimizer.param_groups[1]["lr"] = 0.1 / (number + 2)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.sin(p.detach() + number)
        optimizer.step(loss=5.0)
    assert len(made_plans) == 1


@pytest.mark.parametrize("cls, options", [(MomoAdam, {}), (MomoAdam, {"averaging": True}), (MomoMuon, {})])
def test_no_gradient_is_kept(cls, options):
    params = parameters()
    optimizer = cls(params, lr=0.1, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        gone = [weakref.ref(p.grad) for p in params]
        optimizer.step(loss=1.0)
        optimizer.zero_grad()
        gc.collect()
        assert not any(ref() is not None for ref in gone)


@pytest.mark.parametrize("averaging", [False, True])
def test_nothing_of_a_search_is_kept_when_it_is_over(averaging):
    params = parameters()
    optimizer = MomoAdam(params, lr="auto", averaging=averaging)
    origins = []
    while optimizer.searching:
        for p in params:
            p.grad = 4 * p.detach()
        optimizer.step(loss=sum(2 * p.detach().square().sum() for p in params))
        origins = origins or [weakref.ref(optimizer.state[p]["origin"]) for p in params]
    optimizer.step(loss=1.0)
    gc.collect()
    assert origins and not any(ref() is not None for ref in origins)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradients_of_copies_of_a_distributed_tensor_count_at_every_step(mesh, options):
    ends = []
    for distributed in (False, True):
        params = parameters()
        if distributed:
            params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])) for p in params]
        optimizer = MomoAdam(params, **{"lr": 0.1, **options})
        for number in range(4):
            for p in params:
                p.grad = torch.sin(p.detach()) + number
            optimizer.step(loss=5.0 - number / 10)
        ends.append([whole(p.detach()) for p in params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_device_no_tensor_of_the_state_is_kept_either(device: Device, options):
    params = device.parameters([(4, 6), (24,)])
    optimizer = MomoAdam(params, **{"lr": 0.1, **options})
    optimizer.step(loss=torch.ones((), device="cuda"))
    moved = [(entry, name) for entry in optimizer.state.values() for name in entry]
    gone = [weakref.ref(entry[name]) for entry, name in moved]
    for entry, name in moved:
        entry[name] = torch.empty_like(entry[name])
    gc.collect()
    assert gone and not any(ref() is not None for ref in gone)


def test_a_square_matrix_that_is_transposed_where_it_lies_is_not_taken_for_what_it_was():
    ends = []
    for anew in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5))
        optimizer = MomoAdam([p], lr=0.1)
        for number in range(4):
            if number == 2:
                p.data = p.data.t()
            if anew:
                optimizer._modelled.plan = None
            p.grad = torch.linspace(0, 1, 25).view(5, 5) + number
            optimizer.step(loss=5.0)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_another_tensor_can_be_put_in_the_place_of_a_parameter(options):
    params = parameters()
    optimizer = MomoAdam(params, **{"lr": 0.1, **options})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    optimizer.zero_grad()
    for p in params:
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def test_what_others_put_into_the_state_does_no_harm():
    params = parameters()
    optimizer = MomoAdam(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        optimizer.state[params[0]]["note"] = "not a tensor"
    assert optimizer.param_groups[0]["step"] == 3


def test_a_step_that_fails_keeps_no_gradient(monkeypatch):
    params = parameters()
    optimizer = MomoAdam(params, lr=0.1)
    for number in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        if number:
            monkeypatch.setattr(optimizer._modelled, "decide", None)
            with pytest.raises(TypeError):
                optimizer.step(loss=1.0)
        else:
            optimizer.step(loss=1.0)
    gone = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in gone)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), join=st.booleans())
def test_a_division_has_every_element_once_in_lists_of_bounded_size(sizes, join):
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("SMALL", 4), ("TOGETHER", 8), ("PART", 16)):
            patch.setattr(lists, name, size)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        tensors = [torch.arange(start, start + size) for start, size in zip(starts, sizes)]
        given = [t.repeat_interleave(2)[::2] if i % 2 else t for i, t in enumerate(tensors)]
        found = Division(sizes, join).of(given, tensors)
    assert sorted(torch.cat([t for tensors in found for t in tensors]).tolist()) == list(range(sum(sizes)))
    assert all(t.is_contiguous() and t.numel() <= 16 for tensors in found for t in tensors)
    assert all(sum(t.numel() for t in tensors[:-1]) < 8 for tensors in found)
    assert join or all(len(tensors) == 1 for tensors in found)
    assert all(len({t.numel() < 4 for t in tensors}) == 1 for tensors in found if tensors[0].numel() < 4)
