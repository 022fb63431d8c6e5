"""A Trainer that averages evaluates and saves a model with BatchNorm's statistics at the averaged weights; expected ones are the
mean and the variance of all data, which are one batch."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from momo_hf import MomoCallback
from momo_hf.integrations import batch_norm
from tests.integrations.test_transformers import arguments
from tests.toys import Points


class Normed(nn.Module):
    def __init__(self, freezes=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7)
        self.second, self.other = nn.Linear(7, 7), nn.BatchNorm1d(7)
        self.third, self.dropout, self.freezes = nn.Linear(7, 3), nn.Dropout(0.2), freezes

    def train(self, mode=True):
        super().train(mode)
        if self.freezes:
            self.norm.eval()
        return self

    def forward(self, inputs, labels):
        hidden = self.second(torch.tanh(self.norm(self.first(inputs))))
        outputs = self.third(self.dropout(torch.tanh(self.other(hidden))))
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


class Stream(IterableDataset):
    def __iter__(self):
        data = Points()
        while True:
            yield from (data[row] for row in range(len(data)))


def trained(tmp_path, callbacks=(), data=None, freezes=False, cls=Trainer, **options):
    args = arguments(
        tmp_path,
        **{
            "learning_rate": 0.1, "optim_args": "averaging=true", "per_device_train_batch_size": 24, "label_names": ["labels"],
            "max_steps": 8, **options,
        },
    )  # fmt: skip
    trainer = cls(
        Normed(freezes), args, train_dataset=data or Points(), eval_dataset=Points(), callbacks=list(callbacks)
    )
    trainer.train()
    return trainer


def is_of_the_weights(tensors):
    """Whether the statistics of the first layer are those of its weights."""
    hidden = torch.nn.functional.linear(Points().inputs, tensors["first.weight"], tensors["first.bias"])
    found, var = tensors["norm.running_mean"], tensors["norm.running_var"]
    return torch.allclose(found, hidden.mean(0), atol=1e-5) and torch.allclose(var, hidden.var(0), rtol=1e-4)


def said(caplog):
    return sum("This model has BatchNorm" in record.getMessage() for record in caplog.records)


class Watching(Trainer):
    """Remembers what its evaluations saw."""

    def prediction_step(self, model, *args, **kwargs):
        assert not any(module.training for module in model.modules())
        self.seen = {
            **getattr(self, "seen", {}),
            self.state.global_step: {k: v.clone() for k, v in model.state_dict().items()},
        }
        return super().prediction_step(model, *args, **kwargs)


def test_evaluations_and_files_have_the_statistics_of_the_average(tmp_path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    trainer = trained(tmp_path, cls=Watching, **options)
    assert {3, 6} <= set(trainer.seen)
    assert all(map(is_of_the_weights, trainer.seen.values()))
    for step in (2, 4, 6):
        assert is_of_the_weights(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
    trainer.save_model(tmp_path / "end")
    assert is_of_the_weights(load_file(tmp_path / "end" / "model.safetensors"))
    assert said(caplog) == 1


@pytest.mark.parametrize("data", [Stream, Points])
def test_they_are_taken_once_for_every_state_of_the_weights(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(batch_norm, "update_bn", lambda *args: calls.append(1) or update_bn(*args))
    trainer = trained(tmp_path, [MomoCallback(batch_norm_batches=3)], data(), per_device_train_batch_size=8)
    assert trainer.model.norm.num_batches_tracked == 8
    trainer.evaluate()
    assert trainer.model.norm.num_batches_tracked == 3
    trainer.evaluate()
    trainer.predict(Points())
    trainer.save_model(tmp_path / "end")
    assert len(calls) == 1
    trainer.train()
    trainer.model.eval()
    trainer.save_model(tmp_path / "end")
    assert len(calls) == 2 and not any(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("freezes", [False, True])
def test_training_goes_on_as_without(freezes, tmp_path):
    """Samples are shuffled and dropped at random, and one layer may be frozen by its mode."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 8, "freezes": freezes}
    runs = [trained(tmp_path, [MomoCallback(batches)], **options).model for batches in (0, 20)]
    without, refreshed = (dict(model.named_parameters()) for model in runs)
    assert all(torch.equal(weight, without[name]) for name, weight in refreshed.items())
    changed = {
        name: not torch.equal(value, dict(runs[0].named_buffers())[name]) for name, value in runs[1].named_buffers()
    }
    assert changed["other.running_mean"] and changed["norm.running_mean"] == (not freezes)


class EvaluatesAlways(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


@pytest.mark.parametrize(
    "options, callbacks",
    [
        ({}, [MomoCallback(batch_norm_batches=0)]),
        ({"optim_args": None}, []),
        ({"optim": "adamw_torch", "optim_args": None}, []),
        ({"optim_args": "averaging=true,lr=auto"}, []),
    ],
)
def test_statistics_are_left_alone_where_nothing_is_averaged(options, callbacks, tmp_path, caplog):
    trainer = trained(tmp_path, [*callbacks, EvaluatesAlways()], **options)
    trainer.evaluate()
    trainer.save_model(tmp_path / "end")
    assert trainer.model.norm.num_batches_tracked == 8
    assert not said(caplog)


def test_a_model_without_it_is_not_run_once_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("momo_hf.integrations.batch_norm.update_bn", lambda *args: pytest.fail("nothing to update"))
    monkeypatch.setattr(nn, "BatchNorm1d", lambda width: nn.LayerNorm(width))
    trained(tmp_path, [EvaluatesAlways()]).save_model(tmp_path / "end")
    assert not said(caplog)
