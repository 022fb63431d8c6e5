"""What a run shows, whatever the trainer: numbers in its logs and in every tracker, and a summary."""

import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback

from momo_hf import MomoAdam, MomoCallback, MomoTrainer, MomoTrainerMixin
from tests.integrations.test_transformers import METHODS, arguments
from tests.toys import Net, Points


KEYS = {f"momo/{name}" for name in ("effective_lr", "polyak_lr", "lb", "loss_avg", "capped", "skipped")}


class OwnOptimizer(Trainer):
    """Creates the optimizer itself, as the trainers of some models do."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(self.model.parameters(), **kwargs)
        return self.optimizer


class OwnScheduler(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer or self.optimizer, factor=1.0)
        return self.lr_scheduler


class OwnBoth(OwnOptimizer, OwnScheduler):
    pass


class Mixed(MomoTrainerMixin, OwnBoth):
    pass


def by_hand(model):
    return {"optimizers": (MomoAdam(model.parameters(), lr=1.0), None)}


def by_class(model):
    return {"optimizer_cls_and_kwargs": (MomoAdam, {"lr": 1.0})}


TRAINERS = {
    "plain": (Trainer, lambda model: {}),
    "with the callback": (Trainer, lambda model: {"callbacks": [MomoCallback()]}),
    "with its class": (Trainer, lambda model: {"callbacks": [MomoCallback]}),
    "an optimizer by hand": (Trainer, by_hand),
    "an optimizer by class": (Trainer, by_class),
    "own create_optimizer": (OwnOptimizer, lambda model: {}),
    "own create_scheduler": (OwnScheduler, lambda model: {}),
    "both, with the mixin": (Mixed, lambda model: {}),
    "ours": (MomoTrainer, lambda model: {}),
}


@pytest.mark.parametrize("cls, options", TRAINERS.values(), ids=TRAINERS)
def test_every_trainer_tells_every_tracker(cls, options, tmp_path, caplog):
    model = Net()
    given = options(model)
    named = "optimizers" not in given and "optimizer_cls_and_kwargs" not in given
    args = arguments(tmp_path, optim="momo_adam" if named else "adamw_torch", report_to="tensorboard", logging_steps=2)
    trainer = cls(model, args, train_dataset=Points(), **given)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (written,) = tmp_path.rglob("events.out.tfevents*")  # where, the lines of transformers do not agree on
    events = EventAccumulator(str(written)).Reload()
    for key in KEYS:
        seen = [event.value for event in events.Scalars(f"train/{key}")]
        assert seen == pytest.approx([entry[key] for entry in trainer.state.log_history[:3]], rel=1e-6), key
    assert sum(isinstance(callback, MomoCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert sum("used step sizes" in r.message for r in caplog.records) == 1


def test_another_optimizer_is_left_in_peace(tmp_path):
    trainer = Trainer(Net(), arguments(tmp_path, optim="adamw_torch"), train_dataset=Points())
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert not any(key in entry for entry in trainer.state.log_history for key in KEYS)


def test_training_twice_tells_once_each_time(tmp_path, caplog):
    trainer = Trainer(model_init=lambda: Net(), args=arguments(tmp_path), train_dataset=Points())
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.train()
    assert sum("used step sizes" in r.message for r in caplog.records) == 2
    assert len([callback for callback in trainer.callback_handler.callbacks if type(callback) is MomoCallback]) == 1


def test_a_subclass_of_the_callback_takes_its_place(tmp_path):
    class Ours(MomoCallback):
        pass

    ours = Ours()
    trainer = Trainer(Net(), arguments(tmp_path), train_dataset=Points(), callbacks=[ours])
    trainer.train()
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, MomoCallback)] == [ours]


def test_numbers_appear_at_the_logging_steps_and_only_there(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = arguments(tmp_path, logging_steps=3, learning_rate=1e-3, max_grad_norm=0.0)
    Trainer(Net(), args, train_dataset=Points(), callbacks=[Tracker()]).train()
    logged = [entry for entry in seen if "loss" in entry]
    assert len(logged) == 2 and all(set(entry) >= KEYS for entry in logged)
    assert logged[1]["momo/effective_lr"] == pytest.approx(1e-3) and logged[1]["momo/capped"] == 1.0
    assert logged[1]["momo/polyak_lr"] > 1e-3
    assert not any(key in entry for entry in seen if "loss" not in entry for key in KEYS)


@pytest.mark.parametrize("optim", METHODS)
@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_the_averaged_loss_is_that_of_the_losses_and_not_scaled_by_clips(optim, clip, tmp_path):
    args = arguments(tmp_path, optim=optim, max_grad_norm=clip, learning_rate=1e-3)
    trainer = Trainer(Net(), args, train_dataset=Points())
    trainer.train()
    logs = trainer.state.log_history[:6]
    losses, found = [entry["loss"] for entry in logs], [entry["momo/loss_avg"] for entry in logs]
    weights = [[0.1 * 0.9 ** (k - j) for j in range(k + 1)] for k in range(6)]
    if optim == "momo":  # starts at the first loss and is not corrected
        weights = [[0.9**k, *row[1:]] for k, row in enumerate(weights)]
    assert found == pytest.approx([sum(w * f for w, f in zip(row, losses)) / sum(row) for row in weights], rel=1e-4)


@pytest.mark.parametrize("logging_steps, where", [(1, "at the logging steps"), (500, "at the last step")])
def test_a_summary_ends_the_training(logging_steps, where, tmp_path, caplog):
    args = arguments(tmp_path, learning_rate=1e-3, logging_steps=logging_steps)
    with caplog.at_level(logging.WARNING):
        Trainer(Net(), args, train_dataset=Points()).train()
    (line,) = [r.message for r in caplog.records if "used step sizes" in r.message]
    assert "from 1.00e-03 to 1.00e-03" in line and where in line
    assert "the cap decided 100% of 6 steps, and 0 were skipped" in line


def test_a_bound_above_the_loss_is_pointed_out_once(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=110, optim_args="lb=1000")
    with caplog.at_level(logging.WARNING):
        Trainer(Net(), args, train_dataset=Points()).train()
    assert sum("lb=1000" in r.message and "stalls" in r.message for r in caplog.records) == 1


def test_a_non_finite_loss_is_counted_in_the_logs(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    trainer = Broken(Net(), arguments(tmp_path), train_dataset=Points())
    trainer.train()
    skipped = [entry["momo/skipped"] for entry in trainer.state.log_history if "momo/skipped" in entry]
    assert skipped == [0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_every_row_has_the_cap_of_its_step_and_the_end_the_share_of_the_summary(tmp_path, caplog):
    """Under a schedule that has gone on since, and with steps after the last row."""
    args = arguments(tmp_path, learning_rate=1e-3, logging_steps=4, lr_scheduler_type="linear", max_steps=6)
    trainer = Trainer(Net(), args, train_dataset=Points())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    row = trainer.state.log_history[0]
    assert row["momo/cap"] == row["momo/effective_lr"] == pytest.approx(1e-3 * (6 - 3) / 6)
    (summary,) = [r.message for r in caplog.records if "used step sizes" in r.message]
    assert f"the cap decided {trainer.state.log_history[-1]['momo/capped_in_all']:.0%} of 6 steps" in summary
