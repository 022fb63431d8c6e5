"""The names, the arguments and the trainers."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from momo_hf import (
    Momo,
    MomoAdam,
    MomoSeq2SeqTrainer,
    MomoTrainer,
    MomoTrainerMixin,
    momo_kwargs,
)
from tests.toys import Net, Points, TokenNet


# What a name makes where a learning rate was given.
METHODS = {"momo": (Momo, {}), "momo_adam": (MomoAdam, {}), "momo_adam_auto": (MomoAdam, {"averaging": True})}


def arguments(tmp_path, cls=TrainingArguments, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "optim": "momo_adam",
        "learning_rate": 1.0,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return cls(**{**defaults, **options})


def step_sizes(trainer):
    return [entry["momo/effective_lr"] for entry in trainer.state.log_history if "momo/effective_lr" in entry]


# ---- The loss ----


def by_hand(batches, cls=MomoAdam, net=Net, clip=None, **options):
    """Step sizes of a bare loop over global batches, each one forward and backward pass."""
    model, data = net(dtype=torch.float64), Points(ragged=True, dtype=torch.float64)
    optimizer = cls(model.parameters(), lr=1.0, **options)
    taus = []
    for rows in batches:
        optimizer.zero_grad()
        loss = model(data.inputs[rows], data.labels[rows])["loss"]
        loss.backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.set_clip_factor(clip / (norm + 1e-6))
        optimizer.step(loss=loss)
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    return taus


class InOrder:
    """Takes the data in order, so that a loop by hand sees the same batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class PlainTrainer(InOrder, Trainer):
    pass


class PlainSeq2SeqTrainer(InOrder, Seq2SeqTrainer):
    pass


class OurTrainer(InOrder, MomoTrainer):
    pass


@pytest.mark.parametrize("trainer_cls", [PlainTrainer, PlainSeq2SeqTrainer, OurTrainer])
@pytest.mark.parametrize("optim", METHODS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_trainer_gets_the_loss_of_the_global_batch(trainer_cls, optim, clip, accumulation, tmp_path):
    """Losses normalised by the targets of the whole window: 10 + 10 + 4 rows an epoch, the last window incomplete."""
    cls = Seq2SeqTrainingArguments if trainer_cls is PlainSeq2SeqTrainer else TrainingArguments
    batch = {1: 10, 2: 5, 4: 3}[accumulation]
    args = arguments(
        tmp_path, cls, optim=optim, max_grad_norm=clip, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=batch,
    )  # fmt: skip
    trainer = trainer_cls(TokenNet(dtype=torch.float64), args, train_dataset=Points(ragged=True, dtype=torch.float64))
    trainer.train()
    size = batch * accumulation
    batches = [slice(start, start + size) for start in range(0, 24, size)] * 3
    cls, options = METHODS[optim]
    expected = by_hand(batches[:6], cls, clip=clip, **options)
    torch.testing.assert_close(step_sizes(trainer), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_losses_without_token_counts_are_averaged_over_the_window(accumulation, tmp_path):
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation,
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = OurTrainer(Net(dtype=torch.float64), args, train_dataset=Points(dtype=torch.float64))
    trainer.train()
    model, data = Net(dtype=torch.float64), Points(dtype=torch.float64)
    optimizer, expected = MomoAdam(model.parameters(), lr=1.0), []
    for step in range(6):
        rows = slice(step * 8 % 24, step * 8 % 24 + 8)
        optimizer.zero_grad()
        loss = model(data.inputs[rows], data.labels[rows])["loss"]
        loss.backward()
        optimizer.step(loss=loss)
        expected.append(float(optimizer.param_groups[0]["effective_lr"]))
    torch.testing.assert_close(step_sizes(trainer), expected, rtol=1e-9, atol=0)


def test_bf16_autocast_follows_float32(tmp_path):
    runs = []
    for bf16 in (False, True):
        AcceleratorState._reset_state(True)  # transformers 4 leaves the precision to the first run of a process
        args = arguments(tmp_path, bf16=bf16, learning_rate=0.05, max_steps=20)
        trainer = PlainTrainer(Net(), args, train_dataset=Points())
        trainer.train()
        runs.append([entry["momo/loss_avg"] for entry in trainer.state.log_history if "momo/loss_avg" in entry])
    torch.testing.assert_close(runs[1], runs[0], rtol=0.05, atol=0)
    assert runs[0] != runs[1]


def test_the_official_way_works_too(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", max_grad_norm=0.0)
    kwargs = {**momo_kwargs(args, MomoAdam), "lb": 0.01}
    trainer = OurTrainer(
        Net(), args, train_dataset=Points(), optimizer_cls_and_kwargs=(MomoAdam, kwargs)
    )  # fmt: skip
    trainer.train()
    assert len(step_sizes(trainer)) == 6 and trainer.optimizer.param_groups[0]["lb"] == 0.01


def test_an_optimizer_of_the_users_own_is_taken_as_it_is(tmp_path):
    model = Net()
    optimizer = MomoAdam(model.parameters(), lr=0.5, lb=0.02)
    trainer = OurTrainer(model, arguments(tmp_path), train_dataset=Points(), optimizers=(optimizer, None))
    trainer.train()
    assert len(step_sizes(trainer)) == 6 and optimizer.param_groups[0]["lb"] == 0.02


def test_a_loss_that_a_trainer_changes_is_the_one_that_counts(tmp_path):
    class Doubled(InOrder, Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Doubled(Net(), arguments(tmp_path, max_grad_norm=0.0), train_dataset=Points())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["momo/loss_avg"] == pytest.approx(first["loss"], rel=1e-4)


def test_seq2seq_trainer_is_one():
    assert issubclass(MomoSeq2SeqTrainer, MomoTrainerMixin) and issubclass(MomoSeq2SeqTrainer, Seq2SeqTrainer)
