"""Trainer and accelerate with averaged iterates: what is evaluated, saved, loaded and resumed. At the cap and with decay at
y every expected weight comes from schedule-free AdamW in a bare loop."""

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from momo_hf import MomoAdam
from tests.integrations.test_transformers import PlainTrainer, arguments
from tests.toys import Net, Points


LR, BATCH = 0.03, 8
AT_THE_CAP = "averaging=0.9,divide=false,lb=-1e6"


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(found, expected):
    torch.testing.assert_close(dict(found), expected, rtol=1e-9, atol=1e-12)
    return True


def rows(step):
    start = step * BATCH % 24
    return slice(start, start + BATCH)


def free_run(steps, clip=1.0):
    """The averaged weights and the loss of all data under them before and after every step, by schedule-free AdamW."""
    model, data = Net(dtype=torch.float64), Points(dtype=torch.float64)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=LR, r=3.0)
    averaged, losses = [], []
    for step in range(steps + 1):
        optimizer.eval()
        averaged.append(weights(model))
        losses.append(float(model(data.inputs, data.labels)["loss"].detach()))
        optimizer.train()
        optimizer.zero_grad()
        model(data.inputs[rows(step)], data.labels[rows(step)])["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return averaged, losses


def trainer_for(tmp_path, cls=PlainTrainer, **options):
    args = arguments(
        tmp_path,
        **{"learning_rate": LR, "max_steps": 8, "optim_args": AT_THE_CAP, "label_names": ["labels"], **options},
    )
    data = Points(dtype=torch.float64)
    return cls(Net(dtype=torch.float64), args, train_dataset=data, eval_dataset=data)


def saved(folder):
    return load_file(folder / "model.safetensors")


# ---- Trainer ----


def test_a_trainer_evaluates_saves_and_ends_with_the_averaged_weights(tmp_path):
    """Checkpoints between two evaluations too, where transformers itself saves whatever the parameters hold."""
    averaged, losses = free_run(8)
    trainer = trainer_for(tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert {3, 6} <= set(evaluated)  # transformers 5 evaluates at the end too
    assert evaluated == pytest.approx({step: losses[step] for step in evaluated})
    for step in (2, 4, 6, 8):
        assert close(saved(tmp_path / f"checkpoint-{step}"), averaged[step])
        state = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert [group["train_mode"] for group in state["param_groups"]] == [False, False]
    assert close(weights(trainer.model), averaged[8])
    trainer.save_model(tmp_path / "end")
    assert close(saved(tmp_path / "end"), averaged[8])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[8])
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(losses[8])


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_a_resumed_trainer_goes_on_bit_for_bit(eval_strategy, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": eval_strategy, "eval_steps": 2}
    options["lr_scheduler_type"] = "linear"
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name])


class StopsAtStepFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_the_best_model_is_loaded_over_the_averaged_weights(tmp_path):
    """The last step is not evaluated, so that training ends in train mode."""
    averaged, losses = free_run(5)
    trainer = trainer_for(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.add_callback(StopsAtStepFive())
    trainer.train()
    assert trainer.state.global_step == 5
    best = max((2, 4), key=lambda step: losses[step])
    assert close(weights(trainer.model), averaged[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best])
    assert close(weights(trainer.model), averaged[best])


class SavesAtStepThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            before = weights(self.trainer.model)
            self.trainer.save_model(self.folder)
            self.same = all(torch.equal(w, before[n]) for n, w in weights(self.trainer.model).items())
            self.trains = kwargs["optimizer"].optimizer.trains


class OwnLoop(PlainTrainer):
    """Never puts the optimizer into train mode, as trainers whose training step is their own."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("cls", [PlainTrainer, OwnLoop])
def test_a_model_that_is_saved_in_between_leaves_training_as_it_was(cls, tmp_path):
    averaged, _ = free_run(8)
    trainer, callback = trainer_for(tmp_path, cls, save_strategy="steps", save_steps=5), SavesAtStepThree()
    callback.trainer, callback.folder = trainer, tmp_path / "three"
    trainer.add_callback(callback)
    trainer.train()
    assert callback.trains and callback.same
    assert close(saved(tmp_path / "three"), averaged[3])
    assert close(saved(tmp_path / "checkpoint-5"), averaged[5])
    assert close(weights(trainer.model), averaged[8])


def test_training_goes_on_after_training(tmp_path):
    averaged, _ = free_run(8)
    trainer = trainer_for(tmp_path, max_steps=6)
    trainer.train()
    assert close(weights(trainer.model), averaged[6])
    trainer.train()  # from the first batch again, which is the seventh here
    assert trainer.optimizer.param_groups[0]["step"] == 12


def test_other_optimizers_are_saved_as_before(tmp_path):
    trainer = trainer_for(tmp_path, optim="adamw_torch", optim_args=None, save_strategy="steps", save_steps=2)
    trainer.train()
    assert all(torch.equal(saved(tmp_path / "checkpoint-8")[n], w) for n, w in weights(trainer.model).items())


# ---- accelerate ----


class Loop:
    """An accelerate loop with accumulation and clipping over the same batches."""

    def __init__(self, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Net(dtype=torch.float64)
        made = MomoAdam(model.parameters(), **{"lr": LR, "averaging": 0.9, "divide": False, "lb": -1e6, **options})
        self.model, self.optimizer = self.accelerator.prepare(model, made)
        self.data = Points(dtype=torch.float64)

    def train(self, steps):
        for step in steps:
            self.model.train()
            self.optimizer.train()
            for half in (slice(0, 4), slice(4, 8)):
                inputs, labels = (t[rows(step)][half] for t in (self.data.inputs, self.data.labels))
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(inputs, labels)["loss"])
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()


def test_an_accelerate_loop_evaluates_and_saves_the_averaged_weights(tmp_path):
    averaged, _ = free_run(8)
    loop = Loop()
    for step in range(8):
        loop.train([step])
        if step % 2:
            loop.optimizer.eval()
            assert close(weights(loop.model), averaged[step + 1])
        else:
            before = weights(loop.model)
            loop.accelerator.save_model(loop.model, tmp_path / str(step))  # in train mode
            assert all(torch.equal(w, before[n]) for n, w in weights(loop.model).items())
            assert loop.optimizer.optimizer.trains
            assert close(saved(tmp_path / str(step)), averaged[step + 1])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"lr": 10.0, "lb": 0.0, "divide": True, "weight_decay": 0.01}])
def test_a_resumed_accelerate_loop_goes_on_bit_for_bit(mode, options, tmp_path):
    whole = Loop(**options)
    whole.train(range(4))
    getattr(whole.optimizer, mode)()
    whole.accelerator.save_state(tmp_path)
    resumed = Loop(**options)
    resumed.accelerator.load_state(tmp_path)
    for loop in (whole, resumed):
        loop.train(range(4, 8))
        loop.optimizer.eval()
    assert all(torch.equal(w, weights(resumed.model)[n]) for n, w in weights(whole.model).items())


def test_a_step_in_eval_mode_is_an_error_through_accelerate_too():
    loop = Loop()
    loop.train(range(2))
    loop.optimizer.eval()
    loop.accelerator.backward(loop.model(loop.data.inputs, loop.data.labels)["loss"])
    loop.accelerator.gradient_state._set_sync_gradients(True)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        loop.optimizer.step()
