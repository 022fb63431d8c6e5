"""The loop beside loops by hand, and Muon with AdamW beside its definition."""

import math

import numpy as np
import pytest
import schedulefree
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from momo_hf import MomoAdam
from momo_hf.recipes.yardstick.data import Data
from momo_hf.recipes.yardstick.loop import batches, fit
from momo_hf.recipes.yardstick.muon import MuonAndAdamW, hidden_matrices_apart


STEPS = 40


@pytest.fixture
def data():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    return Data(list(zip(x, x[:, 0] > 0)), None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model, batch):
    return 30 * nn.functional.cross_entropy(model(batch[0]), batch[1].long())  # far above the norm that is clipped


def by_hand(model, data, rate, step):
    """`rate`: of the step; `step`: is given the rate, the loss and the norm of the gradients before clipping."""
    for number, batch in enumerate(batches(data, 8, STEPS, seed=3)):
        loss = loss_of(model, batch)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p.grad = g
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters())).float()
        assert number > 10 or norm > 1.5
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        step(rate(number), loss.detach(), norm)
    return model


def assert_alike(one, other):
    for p, q in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def linear(number):
    """A tenth of the steps of warmup, and then a straight line to 0."""
    return number / 4 if number < 4 else (STEPS - number) / (STEPS - 4)


def cosine(number):
    """A tenth of the steps of warmup, and then half a period down to 0."""
    return number / 4 if number < 4 else 0.5 * (1 + math.cos(math.pi * (number - 4) / (STEPS - 4)))


@pytest.mark.parametrize("schedule, rate", [("constant", lambda number: 1.0), ("linear", linear), ("cosine", cosine)])
def test_adamw_is_clipped_and_scheduled(data, schedule, rate):
    expected = network()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)

    def step(rate, loss, norm):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.step()

    by_hand(expected, data, rate, step)
    model = network()
    optimizer_of_loop = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer_of_loop, schedule, batches(data, 8, STEPS, seed=3), loss_of, STEPS)
    assert_alike(model, expected)


def test_momo_is_told_of_the_loss_and_the_clipping(data):
    expected = network()
    optimizer = MomoAdam(expected.parameters(), lr=1.0)

    def step(rate, loss, norm):
        optimizer.set_clip_factor(float(1.0 / (norm + 1e-6)))
        optimizer.step(loss=float(loss))

    by_hand(expected, data, lambda number: 1.0, step)
    model = network()
    fit(model, MomoAdam(model.parameters(), lr=1.0), "constant", batches(data, 8, STEPS, seed=3), loss_of, STEPS)
    assert_alike(model, expected)


def test_an_average_is_what_is_measured(data):
    expected = network()
    optimizer = schedulefree.AdamWScheduleFree(expected.parameters(), lr=1e-1)
    optimizer.train()
    by_hand(expected, data, lambda number: 1.0, lambda *_: optimizer.step())
    trained = [p.detach().clone() for p in expected.parameters()]
    optimizer.eval()
    model = network()
    own = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-1)
    fit(model, own, "constant", batches(data, 8, STEPS, seed=3), loss_of, STEPS)
    assert_alike(model, expected) and not model.training
    assert not torch.allclose(trained[0], model[0].weight, atol=1e-3)


def test_batches_depend_on_their_seed_alone(data):
    def rows(seed, steps=7):
        return [batch[0][:, 0].tolist() for batch in batches(data, 8, steps, seed)]

    torch.manual_seed(1)
    first = rows(0)
    torch.manual_seed(2)
    assert rows(0) == first != rows(1) and [len(batch) for batch in first] == [8] * 7
    epoch = sum(first[:3], [])
    assert len(set(epoch)) == 24  # no row twice in an epoch, whose last six rows are dropped
    assert [len(batch) for batch in rows(0, 2)] == [8, 8]
    (whole,) = batches(data._replace(train=data.train[:3]), 8, 1, 0)
    assert len(whole[0]) == 3


def muon_by_definition(p, buffer, lr, shapes=(3.4445, -4.7750, 2.0315)):
    """Jordan's Muon in float64: Nesterov momentum of 0.95, five Newton-Schulz steps, the size of Adam's steps."""
    a, b, c = shapes
    grad = p.grad.double().numpy()
    buffer += 0.05 * (grad - buffer)
    direction = grad + 0.95 * (buffer - grad)
    x = direction / np.linalg.norm(direction)
    for _ in range(5):
        x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
    with torch.no_grad():
        p -= torch.tensor(lr * 0.2 * max(p.shape) ** 0.5 * x)


def test_muon_is_as_defined_beside_torchs_adamw(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 20))
    groups = {group["method"]: group["params"] for group in hidden_matrices_apart(model)}
    # 4 is narrow, and the last layer is the output.
    assert {id(p) for p in groups["muon"]} == {id(model[1].weight), id(model[3].weight)}
    assert len(groups["muon"]) + len(groups["adam"]) == len(list(model.parameters()))
    other = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 20))
    other.load_state_dict(model.state_dict())
    hidden = [other[1].weight, other[3].weight]
    rest = [p for p in other.parameters() if not any(p is q for q in hidden)]
    adamw = torch.optim.AdamW(rest, weight_decay=0)
    buffers = [np.zeros(p.shape) for p in hidden]

    def step(rate, loss, norm):
        adamw.param_groups[0]["lr"] = 1e-2 * rate
        adamw.step()
        for p, buffer in zip(hidden, buffers):
            muon_by_definition(p, buffer, 1e-2 * rate)

    by_hand(other, data, linear, step)
    optimizer = MuonAndAdamW(hidden_matrices_apart(model), lr=1e-2)
    fit(model, optimizer, "linear", batches(data, 8, STEPS, seed=3), loss_of, STEPS)
    assert_alike(model, other)


def test_muon_has_the_hidden_matrices_of_a_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    groups = {group["method"]: group["params"] for group in hidden_matrices_apart(model)}
    names = {id(p): name for name, p in model.named_parameters()}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"transformer.h.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert {names[id(p)] for p in groups["muon"]} == expected
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    (group,) = hidden_matrices_apart(model)
    assert group["method"] == "adam" and all(p.ndim == 1 for p in group["params"])
    MuonAndAdamW([group])
