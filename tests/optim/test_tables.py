"""Embeddings: where iterates are averaged, steps in tables are bounded, and after a search other parameters have half the cap."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from momo_hf import Momo, MomoAdam, MomoMuon, mark_tables, muon_groups
from tests.averaging_reference import AveragingReference, close, give, problem, values
from tests.optim.problem import both
from tests.optim.ramp_reference import fall


SHAPES, TABLES = [(6, 2), (3, 4), (8, 3)], (0, 2)


def looked_up(seed=0):
    """Parameters, and gradients of which most rows of a table are 0, so that the others are rare and large steps."""
    generator = np.random.default_rng(seed)
    start = [generator.standard_normal(shape) for shape in SHAPES]

    def grads(step):
        noise = np.random.default_rng(100 + step)
        rows = [noise.random(shape[0]) < (0.15 if i in TABLES else 1.0) for i, shape in enumerate(SHAPES)]
        return [noise.standard_normal(shape) * seen[:, None] for shape, seen in zip(SHAPES, rows)]

    return start, [nn.Parameter(torch.tensor(p)) for p in start], grads


@pytest.mark.parametrize("kept", [1 << 25, 5, 0])  # how much of u is kept between the passes
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_is_that_of_the_formulas(kept, dtype, tolerance, weight_decay, monkeypatch):
    monkeypatch.setattr("momo_hf.optim.kernels.memory.KEPT", kept)
    start, params, grads = looked_up()
    params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    group = {"params": params, "tables": TABLES}
    optimizer = MomoAdam([group], lr=0.02, weight_decay=weight_decay, averaging=True)
    free = AveragingReference(start, [0] * 3, [0.02], [weight_decay])
    reference = AveragingReference(start, [0] * 3, [0.02], [weight_decay], tables=TABLES)
    for step in range(30):
        give(params, grads(step))
        optimizer.step(loss=torch.tensor(50.0, dtype=dtype))
        reference.step(50.0, grads(step))
        free.step(50.0, grads(step))
        assert close(values(params), reference.y, tolerance, tolerance)
    assert np.abs(reference.y[0] - free.y[0]).max() > 0.01  # the bound decided
    optimizer.eval()
    assert close(values(params), reference.x, tolerance, tolerance)


@pytest.mark.parametrize("cls, options", [(MomoAdam, {"averaging": False}), (Momo, {"averaging": True})])
def test_only_directions_of_adam_in_averaged_steps_are_bounded(cls, options):
    """The paper's step has a momentum, and the size of a gradient says nothing."""
    found = []
    for tables in ((), TABLES):
        _, params, grads = looked_up()
        optimizer = cls([{"params": params, "tables": tables}], lr=0.05, **options)
        for step in range(10):
            give(params, grads(step))
            optimizer.step(loss=9.0)
        found.append(values(params))
    assert close(found[0], found[1], 0, 0)


def steps_of(optimizer, params, at, numbers):
    """Steps at the gradients where the parameters are; before each, the loss and the gradients."""
    for step in numbers:
        loss, grads = at(values(params), step)
        give(params, grads)
        yield 10 + loss, grads  # so far above its bound that the bound decides nothing
        optimizer.step(loss=10 + loss)


def until_found(optimizer, params, at):
    for _ in steps_of(optimizer, params, at, range(70)):
        if not optimizer.searching:
            break


@both
@pytest.mark.parametrize("embeddings, times", [((0,), 0.7), ((1,), 3.0)])
def test_beside_embeddings_half_of_the_cap_counts_with_adam_after_a_search(cls, embeddings, times, caplog):
    """Embeddings are in one group with others; others are in a group without any, with the larger `lr` and with the smaller."""
    caplog.set_level(logging.INFO)
    start, params, at = problem()
    bounds = {"tables": (0,)} if embeddings == (0,) else {}
    groups = [{"params": params[:2], "embeddings": embeddings, "weight_decay": 0.1, **bounds}, {"params": params[2:]}]
    optimizer = cls(groups, lr="auto", averaging=True)
    optimizer.param_groups[1]["lr"] *= times
    until_found(optimizer, params, at)
    number, cap, adam = optimizer.search.steps, optimizer.search.cap, cls is MomoAdam
    share = 0.5 if adam else 1.0
    members = [0 if i in embeddings else 1 for i in range(2)] + [2, 2]
    tables = (0,) if bounds and adam else ()
    right = AveragingReference(
        start, members, [], [0.1, 0.1, 0.0], beta2=0.999 if adam else None, polyak=2.0, tables=tables
    )
    losses = []
    for j, (loss, grads) in enumerate(steps_of(optimizer, params, at, range(100, 200)), start=1):
        if losses:
            assert close(values(params), right.y)
            tau = right.taus[-1]
            shown = [float(group["effective_lr"]) for group in optimizer.param_groups]
            assert shown == pytest.approx([tau / max(right.lrs) * lr for lr in (right.lrs[0], right.lrs[2])])
            assert float(optimizer.cap()) == pytest.approx(max(right.lrs))
        lr = cap * min(1.0, j / number) * fall(optimizer.search.losses, losses, corrected=adam)
        right.lrs = [lr, share * lr, times * share * lr]
        losses.append(loss)
        right.step(loss, grads)
    assert min(right.taus[number:]) > 0.9 * cap * max(1.0, times * share)  # the cap decided
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cap)
    assert ("for all other parameters 0.5 of it counts" in caplog.text) is adam


@pytest.mark.parametrize("frozen", [True, False])
def test_embeddings_have_the_cap_wherever_among_groups_that_are_alike_they_are(frozen):
    """Groups of the same options share their work: after one without embeddings, or with frozen ones alone, come some that learn."""
    found = []
    for grouped in (True, False):
        _, params, at = problem()
        first = {"params": params[:2], "embeddings": (0,) if frozen else ()}
        groups = [first, {"params": params[2:], "embeddings": (1,)}]
        optimizer = MomoAdam(
            groups if grouped else [{"params": params, "embeddings": (3,)}], lr="auto", averaging=True
        )
        for step in range(90):
            loss, grads = at(values(params), step)
            give(params, [None if frozen else grads[0], *grads[1:]])
            optimizer.step(loss=10 + loss)
        assert not optimizer.searching
        found.append(values(params))
    assert close(found[0], found[1])


@pytest.mark.parametrize(
    "cls, lr, averaging", [(MomoAdam, "auto", False), (MomoAdam, 0.02, True), (MomoMuon, "auto", True)]
)
def test_embeddings_alone_change_nothing_elsewhere(cls, lr, averaging):
    """In the paper's step, where `lr` was given, and beside Muon's directions."""
    found = []
    for embeddings in ((), (0,)):
        _, params, at = problem()
        members = {"params": params, "embeddings": embeddings}
        optimizer = cls([members | ({"method": "adam"} if cls is MomoMuon else {})], lr=lr, averaging=averaging)
        for _ in steps_of(optimizer, params, at, range(90)):
            pass
        assert lr != "auto" or not optimizer.searching
        found.append(values(params))
    assert close(found[0], found[1], 0, 0)


def test_embeddings_that_did_not_learn_do_not_count():
    """Frozen after they were marked, or never looked up."""
    found = []
    for embeddings in ((), (0,)):
        _, params, at = problem()
        optimizer = MomoAdam([{"params": params, "embeddings": embeddings}], lr="auto", averaging=True)
        for step in range(90):
            loss, grads = at(values(params), step)
            give(params, [None, *grads[1:]])
            optimizer.step(loss=10 + loss)
        assert not optimizer.searching
        found.append(values(params))
    assert close(found[0], found[1], 0, 0)


def test_a_resume_after_a_search_keeps_what_counts_beside_embeddings():
    def made():
        _, params, at = problem()
        optimizer = MomoAdam([{"params": params, "embeddings": (0,)}], lr="auto", averaging=True)
        return params, at, optimizer

    params, at, optimizer = made()
    until_found(optimizer, params, at)
    list(steps_of(optimizer, params, at, range(70, 80)))
    saved = copy.deepcopy((optimizer.state_dict(), values(params)))
    list(steps_of(optimizer, params, at, range(80, 90)))
    wanted = values(params)
    for same in (True, False):
        params, at, resumed = made()
        state = copy.deepcopy(saved[0])
        if not same:  # as a state of the version before
            del state["param_groups"][0]["embeddings"]
        with torch.no_grad():
            for p, value in zip(params, saved[1]):
                p.copy_(torch.tensor(value))
        resumed.load_state_dict(state)
        list(steps_of(resumed, params, at, range(80, 90)))
        assert all(map(np.array_equal, values(params), wanted)) is same


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.words, self.bag = nn.Embedding(7, 4), nn.EmbeddingBag(5, 4)
        self.hidden, self.output = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.output.weight = self.words.weight


def marked(optimizer, name="tables"):
    return [id(g["params"][i]) for g in optimizer.param_groups for i in g.get(name, ())]


def test_tables_are_what_is_looked_up_and_nothing_else():
    model = Model()
    for optimizer in (
        MomoAdam(model.parameters(), averaging=True),
        MomoMuon(muon_groups(model), averaging=True),
        MomoAdam([{"params": [p], "lr": 0.1} for p in model.parameters()], averaging=True),
    ):
        mark_tables(AveragedModel(model).module, optimizer)  # another model
        assert not marked(optimizer)
        mark_tables(nn.Sequential(model), optimizer)
        assert marked(optimizer) == [id(model.words.weight), id(model.bag.weight)]
        assert marked(optimizer, "embeddings") == (marked(optimizer) if type(optimizer) is MomoAdam else [])

    other = Model()
    optimizer = MomoAdam([*model.parameters(), *other.parameters()], averaging=True)
    for one in (model, other, model):
        mark_tables(one, optimizer)
    assert marked(optimizer) == [id(t.weight) for t in (model.words, model.bag, other.words, other.bag)]

    tied = Model(tied=True)
    optimizer = MomoAdam(tied.parameters(), averaging=True)
    mark_tables(tied, optimizer)
    assert marked(optimizer) == [id(tied.bag.weight)]
    assert marked(optimizer, "embeddings") == [id(tied.words.weight), id(tied.bag.weight)]

    few = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 100))  # as the classes of a U-Net
    optimizer = MomoAdam(few.parameters(), averaging=True)
    mark_tables(few, optimizer)
    assert marked(optimizer) == [id(few[0].weight)] and not marked(optimizer, "embeddings")
    few[1].requires_grad_(False)
    mark_tables(few, optimizer)
    assert marked(optimizer, "embeddings") == [id(few[0].weight)]

    for other in (Momo, MomoMuon):  # for which it would make no difference
        optimizer = other(tied.parameters(), averaging=True)
        mark_tables(tied, optimizer)
        assert marked(optimizer) == [id(tied.bag.weight)] and not marked(optimizer, "embeddings")

    optimizer = MomoAdam(model.parameters())
    mark_tables(model, optimizer)
    assert not marked(optimizer)


def take_steps(model, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (torch.rand(len(p), 1, generator=generator) < 0.2)
        optimizer.step(loss=9.0)


def test_a_mark_is_a_part_of_the_state():
    """It goes along, and a state without it goes on as it began."""
    torch.manual_seed(0)
    made = Model()
    made.hidden.bias = None
    for marks in (True, False):
        models = [copy.deepcopy(made) for _ in range(2)]
        first, second = (MomoAdam(model.parameters(), lr=0.1, averaging=True) for model in models)
        if marks:
            mark_tables(models[0], first)
        else:
            mark_tables(models[1], second)
        take_steps(models[0], first, 5)
        mark_tables(models[0], first)  # too late
        assert bool(marked(first)) is marks
        models[1].load_state_dict(models[0].state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert bool(marked(second)) is marks
        for model, optimizer in zip(models, (first, second)):
            take_steps(model, optimizer, 4)
        torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=0, atol=0)


def test_a_copy_of_a_group_has_tables_of_its_own():
    model = Model()
    optimizer = MomoAdam(model.parameters(), averaging=True)
    mark_tables(model, optimizer)
    late = [nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
    optimizer.add_param_group({**optimizer.param_groups[0], "params": late[:1]})
    optimizer.add_param_group({"params": late[1:], "tables": (0,), "embeddings": (0,)})
    for name in ("tables", "embeddings"):
        assert marked(optimizer, name) == [id(model.words.weight), id(model.bag.weight), id(late[1])]


@pytest.mark.parametrize("places", [(3,), (-1,), [True], 1])
@pytest.mark.parametrize("name", ["tables", "embeddings"])
def test_a_place_that_is_not_there_is_refused(places, name):
    with pytest.raises(ValueError, match=name):
        MomoAdam([{"params": [nn.Parameter(torch.zeros(shape)) for shape in SHAPES], name: places}], averaging=True)
