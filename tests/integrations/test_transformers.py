"""The names, the arguments and the trainers."""

import logging

import pytest
import torch
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
    MomoAdamAuto,
    MomoCallback,
    MomoSeq2SeqTrainer,
    MomoTrainer,
    MomoTrainerMixin,
    momo_kwargs,
)
from tests.toys import Net, Points, TokenNet


METHODS = {"momo": Momo, "momo_adam": MomoAdam, "momo_adam_auto": MomoAdamAuto}


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
    model = TokenNet(dtype=torch.float64)
    callbacks = [] if trainer_cls is OurTrainer else [MomoCallback()]
    trainer = trainer_cls(model, args, train_dataset=Points(ragged=True, dtype=torch.float64), callbacks=callbacks)
    trainer.train()
    size = batch * accumulation
    batches = [slice(start, start + size) for start in range(0, 24, size)] * 3
    options = {"beta": 0.9} if optim == "momo" else {}
    expected = by_hand(batches[:6], METHODS[optim], clip=clip, **options)
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
        args = arguments(tmp_path, bf16=bf16, learning_rate=0.05, max_steps=20)
        trainer = PlainTrainer(Net(), args, train_dataset=Points(), callbacks=[MomoCallback()])
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


def test_the_mixin_goes_with_any_trainer(tmp_path):
    class SomeTrainer(InOrder, Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    class Mixed(MomoTrainerMixin, SomeTrainer):
        pass

    trainer = Mixed(Net(), arguments(tmp_path, max_grad_norm=0.0), train_dataset=Points())
    trainer.train()
    assert trainer.state.log_history[0]["momo/loss_avg"] == pytest.approx(
        trainer.state.log_history[0]["loss"], rel=1e-5
    )


# ---- What the user sees ----


@pytest.mark.parametrize("optim", METHODS)
@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_the_averaged_loss_is_that_of_the_losses_and_not_scaled_by_clips(optim, clip, tmp_path):
    trainer = OurTrainer(
        Net(), arguments(tmp_path, optim=optim, max_grad_norm=clip, learning_rate=1e-3), train_dataset=Points()
    )
    trainer.train()
    logs = trainer.state.log_history[:6]
    losses, found = [entry["loss"] for entry in logs], [entry["momo/loss_avg"] for entry in logs]
    weights = [[0.1 * 0.9 ** (k - j) for j in range(k + 1)] for k in range(6)]
    if optim == "momo":  # starts at the first loss and is not corrected
        weights = [[0.9**k, *row[1:]] for k, row in enumerate(weights)]
    assert found == pytest.approx([sum(w * f for w, f in zip(row, losses)) / sum(row) for row in weights], rel=1e-5)


def test_numbers_appear_at_the_logging_steps_and_only_there(tmp_path):
    seen = []

    class Tracker(MomoCallback.__mro__[1]):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = arguments(tmp_path, logging_steps=3, learning_rate=1e-3, max_grad_norm=0.0)
    trainer = OurTrainer(Net(), args, train_dataset=Points(), callbacks=[Tracker()])
    trainer.train()
    keys = {f"momo/{name}" for name in ("effective_lr", "polyak_lr", "lb", "loss_avg", "capped", "skipped")}
    logged = [entry for entry in seen if "loss" in entry]
    assert len(logged) == 2 and all(keys <= set(entry) for entry in logged)
    assert logged[1]["momo/effective_lr"] == pytest.approx(1e-3) and logged[1]["momo/capped"] == 1.0
    assert logged[1]["momo/polyak_lr"] > 1e-3
    assert not any(key in entry for entry in seen if "loss" not in entry for key in keys)


def test_a_summary_ends_the_training(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        OurTrainer(Net(), arguments(tmp_path, learning_rate=1e-3), train_dataset=Points()).train()
    (line,) = [r.message for r in caplog.records if "used step sizes" in r.message]
    assert "from 1.00e-03 to 1.00e-03" in line and "the cap decided 100% of 6 steps, and 0 were skipped" in line


def test_a_learning_rate_left_alone_is_pointed_out_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        args = arguments(tmp_path)
        args.learning_rate = TrainingArguments.learning_rate
        OurTrainer(Net(), args, train_dataset=Points()).train()
        assert sum("learning_rate was left" in r.message for r in caplog.records) == 1
        caplog.clear()
        OurTrainer(Net(), arguments(tmp_path), train_dataset=Points()).train()
        assert not any("learning_rate was left" in r.message for r in caplog.records)


def test_a_bound_above_the_loss_is_pointed_out_once(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=110, optim_args="lb=1000")
    with caplog.at_level(logging.WARNING):
        OurTrainer(Net(), args, train_dataset=Points()).train()
    assert sum("lb=1000" in r.message and "stalls" in r.message for r in caplog.records) == 1


def test_a_non_finite_loss_is_counted_in_the_logs(tmp_path):
    class Broken(OurTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    trainer = Broken(Net(), arguments(tmp_path), train_dataset=Points())
    trainer.train()
    skipped = [entry["momo/skipped"] for entry in trainer.state.log_history if "momo/skipped" in entry]
    assert skipped == [0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_seq2seq_trainer_is_one():
    assert issubclass(MomoSeq2SeqTrainer, MomoTrainerMixin) and issubclass(MomoSeq2SeqTrainer, Seq2SeqTrainer)
