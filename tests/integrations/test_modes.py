"""A model that is evaluated or read while the optimizer that averages its weights is in train mode: said once, in any loop, and not
where both are right or nothing is averaged."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from momo_hf import MomoAdam
from tests.integrations.test_transformers import PlainTrainer, arguments
from tests.toys import Net, Points


class Block(nn.Module):
    """A model in a model, with a frozen part in front."""

    def __init__(self):
        super().__init__()
        self.front, self.net = nn.Linear(5, 5), Net()
        self.front.requires_grad_(False)

    def forward(self, inputs, labels):
        return self.net(self.front(inputs), labels)


class Plain:
    def __init__(self, **options):
        self.model = self.inner = Block()
        self.data = Points()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = MomoAdam(params, **{"lr": 0.01, "averaging": True, **options})

    def train(self, steps=2):
        for _ in range(steps):
            self.model.train()
            self.optimizer.train()
            self.optimizer.zero_grad()
            loss = self.model(self.data.inputs, self.data.labels)["loss"]
            self.backward(loss)
        return self

    def backward(self, loss):
        loss.backward()
        self.optimizer.step(loss=loss.detach())

    def evaluate(self, model=None):
        with torch.no_grad():
            return (model or self.model)(self.data.inputs, self.data.labels)["loss"]


class Prepared(Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def backward(self, loss):
        self.accelerator.backward(loss)
        self.optimizer.step()


class Compiled(Plain):
    def __init__(self, **options):
        super().__init__(**options)
        self.model = torch.compile(self.inner, backend="eager", fullgraph=True)


loops = pytest.mark.parametrize("cls", [Plain, Prepared])
EVALUATED, READ = "in eval mode was called", "were read while"


def said(caplog, words):
    return sum(words in record.getMessage() for record in caplog.records)


@loops
def test_a_model_in_eval_mode_alone_is_said_once(cls, caplog):
    loop = cls()
    for _ in range(3):
        loop.train()
        loop.model.eval()
        loop.evaluate()
    assert said(caplog, EVALUATED) == len(caplog.records) == 1
    assert "A Block in eval mode" in caplog.text and "optimizer.eval() beside model.eval()" in caplog.text


@loops
def test_a_part_that_is_evaluated_by_itself_is_said(cls, caplog):
    """As `generate` of an unwrapped model does."""
    loop = cls().train()
    loop.model.eval()
    with torch.no_grad():
        loop.inner.net(loop.data.inputs, loop.data.labels)
    assert said(caplog, EVALUATED) == 1


@loops
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_nothing_is_said_where_both_are_in_eval_mode(cls, first, caplog):
    loop = cls()
    for _ in range(3):
        loop.train()
        for which in sorted(("model", "optimizer"), key=lambda name: name != first):
            getattr(loop, which).eval()
        loop.evaluate()
        loop.model.state_dict()
    assert not caplog.records


def test_nothing_is_said_of_what_is_right_in_train_mode(caplog):
    for loop in (Plain(averaging=False).train(), Plain()):  # the second one before its first step
        loop.model.eval()
        loop.evaluate()
        loop.model.state_dict()
    loop.train()
    loop.evaluate()  # a forward pass without gradients, as for a loss that is logged
    for layer in (loop.inner.net.first, loop.inner.front):  # layers that are kept in eval mode, as BatchNorm's are
        layer.eval()
    loop.model(loop.data.inputs, loop.data.labels)
    copied = copy.deepcopy(loop.model).eval()
    loop.evaluate(copied)
    copied.state_dict()
    loop.model.state_dict(keep_vars=True)
    assert not caplog.records


def test_nothing_is_said_while_a_search_goes_on(caplog):
    loop = Plain(lr="auto").train(3)
    assert loop.optimizer.searching
    loop.model.eval()
    loop.evaluate()
    loop.model.state_dict()
    assert not said(caplog, EVALUATED) + said(caplog, READ)


def test_a_compiled_model_is_evaluated_as_before(caplog):
    loop = Compiled().train()
    for _ in range(3):
        loop.model.eval()
        loop.optimizer.eval()
        assert loop.evaluate() == loop.evaluate(loop.inner)
        loop.train()


@loops
def test_weights_that_are_read_in_train_mode_are_said_once(cls, tmp_path, caplog):
    loop = cls().train()
    for _ in range(2):
        torch.save(loop.model.state_dict(), tmp_path / "model.pt")
    assert said(caplog, READ) == len(caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"optim": "momo_adam_auto", "learning_rate": 5e-5, "optim_args": "lr=auto"}])
def test_a_trainer_says_nothing(options, tmp_path, caplog):
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3, load_best_model_at_end=False,
        **{"learning_rate": 0.01, "optim_args": "averaging=true", "label_names": ["labels"], **options},
    )  # fmt: skip
    trainer = PlainTrainer(Net(), args, train_dataset=Points(), eval_dataset=Points())
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert not said(caplog, EVALUATED) + said(caplog, READ)
