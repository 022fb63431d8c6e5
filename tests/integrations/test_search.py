"""A search for the cap in loops on accelerate and in a Trainer: accumulation, clipping, loss scaling, resuming, words."""

import logging

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from momo_hf import MomoAdam, MomoTrainer
from momo_hf.integrations.model_card import describe
from tests.integrations.test_accelerate import CpuScaler, run_loop
from tests.optim.ramp_reference import ramp
from tests.toys import Net, Points


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("accumulation, clip", [(1, None), (2, 0.1)])
def test_a_loop_on_accelerate_searches_as_the_formula(accumulation, clip):
    model, data = Net(dtype=torch.float64), Points(dtype=torch.float64)

    def gradient(x, k):
        torch.nn.utils.vector_to_parameters(torch.tensor(x), model.parameters())
        rows = slice((k - 1) * 12 % 24, (k - 1) * 12 % 24 + 12)
        model.zero_grad()
        loss = model(data.inputs[rows], data.labels[rows])["loss"]
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()

    rows, _, cap = ramp(vector(model).numpy(), gradient, clip=clip)
    steps = len(rows)
    trained, sizes = run_loop(accumulation, clip=clip, steps=steps + 1, lr="auto")
    expected = 1e-6 * 2 ** (torch.arange(steps, dtype=torch.float64) / 3)
    torch.testing.assert_close(sizes[: steps - 1], expected[: steps - 1], rtol=1e-9, atol=0)
    torch.testing.assert_close(sizes[steps], torch.tensor(cap / steps, dtype=torch.float64), rtol=1e-9, atol=0)
    # One step of training, at a step size that is Adam's there, away from where the search began.
    assert (vector(trained) - vector(Net(dtype=torch.float64))).abs().max() <= cap / steps * 1.001


def scaled(steps, prepared=True, far=1e-3, overflow=()):
    """A loop with a loss scaler; losses are infinite where weights are farther than `far` from where they began."""
    accelerator, scaler = Accelerator(cpu=True), CpuScaler()
    model, data = Net(), Points()
    before, optimizer = vector(model), MomoAdam(model.parameters(), lr="auto")
    if prepared:
        accelerator.scaler = scaler
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    for step in range(steps):
        too_far = (vector(model) - before).abs().max() > far
        loss = model(data.inputs, data.labels)["loss"] * torch.where(too_far, torch.inf, 1.0)
        if prepared:
            accelerator.backward(loss)
        else:
            scaler.scale(loss).backward()
            optimizer.set_loss(loss)
        if step in overflow:
            model.first.weight.grad[0, 0] = float("inf")
        if prepared:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            if optimizer.has_loss:
                optimizer.drop_loss()
        optimizer.zero_grad()
    return before, model, optimizer


@pytest.mark.parametrize("prepared", [True, False])
def test_losses_that_are_not_finite_end_a_search_whose_steps_a_scaler_skips(prepared):
    before, model, optimizer = scaled(50, prepared)
    assert optimizer.search.reason == "the loss or a gradient was not finite"
    assert 1e-6 < optimizer.search.cap < 1e-3 and optimizer.param_groups[0]["step"] > 0
    assert torch.isfinite(vector(model)).all() and not torch.equal(vector(model), before)


@pytest.mark.parametrize("prepared", [True, False])
def test_an_overflow_with_a_finite_loss_waits(prepared):
    _, plain, _ = scaled(20, prepared, far=10)
    _, overflown, optimizer = scaled(24, prepared, far=10, overflow=(1, 5, 6, 7))
    assert optimizer.search.steps == 20 and optimizer.search.cap is None
    assert torch.equal(vector(plain), vector(overflown))
    assert optimizer.param_groups[0]["skipped"] == 4


def train(folder, steps=75, resume=None, logging_steps=25, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        save_steps=20,
        logging_steps=logging_steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        **options,
    )
    trainer = MomoTrainer(
        Net(), arguments, train_dataset=Points(), optimizer_cls_and_kwargs=(MomoAdam, {"lr": "auto"})
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_searches_and_resumes_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")
    search = whole.optimizer.search
    assert 20 < search.steps < 60
    for checkpoint in (20, 60):
        resumed = train(tmp_path / f"from {checkpoint}", resume=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        assert torch.equal(vector(resumed.model), vector(whole.model))
        assert resumed.optimizer.search == search


def test_a_trainer_that_ends_before_the_search_says_so(tmp_path, caplog):
    train(tmp_path, steps=30)
    begun, ended = [record.message for record in caplog.records if "search" in record.message]
    assert "This training has 30 steps" in begun
    assert "Training ended after 30 steps of the search for the cap" in ended


def test_logs_show_the_ramp_and_nothing_is_said_of_a_learning_rate(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="momo_hf"):
        trainer = train(tmp_path)
    first, _, last = trainer.state.log_history[:3]
    search = trainer.optimizer.search
    assert first["momo/effective_lr"] == pytest.approx(search.step_sizes[24])
    assert first["momo/loss_avg"] == pytest.approx(search.losses[24])
    assert 0 < last["momo/effective_lr"] <= search.cap and last["momo/loss_avg"] > 0
    assert f"step sizes up to {search.cap:g}," in describe(trainer.optimizer.optimizer)
    begun, found, summary = (record.message for record in caplog.records if record.name.startswith("momo_hf"))
    assert (
        begun.startswith("search: the first steps, 13 to 60, look for the cap")
        and found.startswith("search: cap")
        and "used step sizes from" in summary
        and "learning rate" not in summary
    )


def test_the_last_step_of_a_search_is_shown_as_one(tmp_path, caplog):
    """After it there is no average of losses yet, and the longest step of all is not one of training."""
    with caplog.at_level(logging.WARNING, logger="momo_hf"):
        trainer = train(tmp_path, logging_steps=1)
    rows = [entry for entry in trainer.state.log_history if "momo/cap" in entry]
    search = trainer.optimizer.search
    last, training = rows[search.steps - 1], [row["momo/effective_lr"] for row in rows[search.steps :]]
    assert last["momo/loss_avg"] == pytest.approx(search.losses[-1])
    assert last["momo/polyak_lr"] == last["momo/effective_lr"] == last["momo/cap"] > max(training)
    assert f"from {min(training):.2e} to {max(training):.2e}" in caplog.text


def test_the_summary_is_of_training_and_not_of_the_search(tmp_path, caplog):
    """The step sizes of a search begin at 1e-6."""
    with caplog.at_level(logging.WARNING, logger="momo_hf"):
        trainer = train(tmp_path, logging_steps=5)
    logged = [entry["momo/effective_lr"] for entry in trainer.state.log_history if "momo/effective_lr" in entry]
    steps = trainer.optimizer.search.steps
    (line,) = [record.message for record in caplog.records if "used step sizes" in record.message]
    assert min(logged) == logged[0] == pytest.approx(trainer.optimizer.search.step_sizes[4])
    assert f"from {min(logged[-((75 - steps) // 5) :]):.2e} to" in line
