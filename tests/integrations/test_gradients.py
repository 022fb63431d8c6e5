"""A loss belongs to gradients: what other models, dropped gradients, closures and clips do to it. One process."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from momo_hf import MomoAdam
from tests.integrations.loops import plain_steps, problem, taken_in, with_optimizer
from tests.integrations.test_accelerate import CpuScaler
from tests.toys import Net, Points


# ---- Losses of other models ----


def gan(momo_for, clip=None, freeze=True):
    """Three rounds of a critic's and a generator's turn; returns the losses that MoMo took in, and the right ones."""
    torch.manual_seed(0)
    accelerator, noise = Accelerator(cpu=True), torch.randn(16, 4, dtype=torch.float64)
    generator, critic = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    models = {"generator": generator, "critic": critic}
    optimizers = {
        name: MomoAdam(model.parameters(), lr=1e-2) if name in momo_for else torch.optim.AdamW(model.parameters())
        for name, model in models.items()
    }
    generator, critic, first, second = accelerator.prepare(generator, critic, *optimizers.values())
    prepared = dict(zip(models, (first, second)))
    bce = nn.functional.binary_cross_entropy_with_logits
    right, found = dict.fromkeys(momo_for, 0.0), {}

    def turn(name, loss):
        accelerator.backward(loss)
        if clip:
            accelerator.clip_grad_norm_(models[name].parameters(), clip)
        prepared[name].step()
        prepared[name].zero_grad()
        if name in momo_for:
            right[name] = 0.9 * right[name] + 0.1 * float(loss.detach())
            found[name] = float(prepared[name].param_groups[0]["loss_avg"])

    for _ in range(3):
        turn("critic", bce(critic(generator(noise).detach()), torch.zeros(16, 1, dtype=torch.float64)))
        critic.requires_grad_(not freeze)
        turn("generator", bce(critic(generator(noise)), torch.ones(16, 1, dtype=torch.float64)))
        critic.requires_grad_(True)
        if not freeze:
            prepared["critic"].zero_grad()
    return right, found


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("momo_for", [["generator"], ["critic"]])
def test_a_second_model_keeps_its_losses_to_itself(momo_for, freeze):
    right, found = gan(momo_for, freeze=freeze)
    assert found == pytest.approx(right, rel=1e-12)


def test_two_momo_optimizers_each_take_in_their_own_losses():
    right, found = gan(["generator", "critic"])
    assert found == pytest.approx(right, rel=1e-12) and len(found) == 2


def test_a_backward_pass_into_two_momo_optimizers_is_refused():
    with pytest.raises(ValueError, match="parameters of 2 MoMo optimizers.*requires_grad_"):
        gan(["generator", "critic"], freeze=False)


def test_clips_and_nans_of_another_model_stay_with_it(caplog):
    accelerator, model, optimizer, loss_of = problem()
    critic = nn.Linear(3, 1).double()
    critic, other = accelerator.prepare(critic, torch.optim.AdamW(critic.parameters()))
    taus = []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            accelerator.backward(loss_of(model))
            accelerator.backward(critic(torch.full((2, 3), float("nan"), dtype=torch.float64)).mean())
            accelerator.clip_grad_norm_(critic.parameters(), 1e-3)
            accelerator.clip_grad_value_(critic.parameters(), 1e-3)
            other.step(), other.zero_grad()
            optimizer.step(), optimizer.zero_grad()
            taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    assert taus == pytest.approx(plain_steps(loss_of), rel=1e-12)
    assert optimizer.param_groups[0]["skipped"] == 0 and not caplog.records


# ---- Gradients that were dropped ----

DROPS = {
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "inner optimizer": lambda model, optimizer: optimizer.optimizer.zero_grad(),
    "by hand": lambda model, optimizer: [p.grad.zero_() for p in model.parameters()],
    "deleted": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("when", ["first micro-batch", "clipped", "whole step"])
def test_a_loss_goes_with_its_gradients(drop, when):
    accelerator, model, optimizer, loss_of = problem()
    if when == "first micro-batch":
        with accelerator.no_sync(model):
            accelerator.backward(1e3 * loss_of(model))
    else:
        accelerator.backward(1e3 * loss_of(model))
        accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        if when == "whole step":
            optimizer.step()
            optimizer.load_state_dict(with_optimizer()[1].state_dict())  # only the loss is left of that step
    drop(model, optimizer)
    loss = loss_of(model)
    accelerator.backward(loss)
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_gradients_that_stay_keep_their_loss():
    """A loop that does not zero its gradients steps on their sum, and so does MoMo's model of the loss."""
    accelerator, model, optimizer, loss_of = problem(lr=1e-2)
    twin, reference = with_optimizer(lr=1e-2)
    total = 0.0
    for clip in (None, 0.1, None):
        accelerator.backward(loss_of(model))
        loss = loss_of(twin)
        loss.backward()
        total = total + loss.detach()
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)
            factor = clip / (nn.utils.clip_grad_norm_(twin.parameters(), clip) + 1e-6)
            reference.set_clip_factor(factor)
        optimizer.step()
        reference.step(loss=total)
        total = total * factor if clip else total
        assert float(optimizer.param_groups[0]["loss_avg"]) == pytest.approx(
            float(reference.param_groups[0]["loss_avg"])
        )
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_what_is_added_after_a_clip_is_not_clipped():
    accelerator, model, optimizer, loss_of = problem()
    first, second = loss_of(model), 2 * loss_of(model)
    accelerator.backward(first)
    factor = 0.1 / (accelerator.clip_grad_norm_(model.parameters(), 0.1) + 1e-6)
    accelerator.backward(second)
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(factor * first.detach() + second.detach()), rel=1e-12)


def test_micro_batches_that_are_clipped_by_themselves_count_as_they_were_clipped():
    accelerator, model, optimizer, loss_of = problem()
    total = 0.0
    for part in (slice(0, 10), slice(10, 24)):
        loss = loss_of(model, part)
        accelerator.backward(loss)
        total = (total + loss.detach()) * (0.1 / (accelerator.clip_grad_norm_(model.parameters(), 0.1) + 1e-6)).clamp(
            max=1
        )
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(total), rel=1e-12)


def test_losses_in_low_precision_add_up_in_float32():
    accelerator, model, optimizer, loss_of = problem(torch.float32)
    for value in (1.0, 2.0**-9, 2.0**-9):
        loss = (loss_of(model) * 0 + value).to(torch.bfloat16)
        accelerator.backward(loss + sum((p - p.detach()).sum() for p in model.parameters()).to(torch.bfloat16))
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(1 + 2.0**-8, rel=1e-6)


def test_a_nan_does_not_outlive_gradients_that_are_zeroed_in_place():
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model) * float("nan"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    loss = loss_of(model)
    accelerator.backward(loss)
    optimizer.step()
    assert optimizer.param_groups[0]["skipped"] == 1
    assert taken_in(optimizer) == pytest.approx(float(loss.detach()))


class Interrupted(torch.autograd.Function):
    """Passes a value through and raises in the backward pass."""

    @staticmethod
    def forward(ctx, value, error):
        ctx.error = error
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("dropped", [True, False])
def test_an_exception_in_backward_leaves_loss_and_gradients_as_they_were(error, dropped):
    accelerator, model, optimizer, loss_of = problem()
    first, second = slice(0, 10), slice(10, 24)
    kept = loss_of(model, first)
    accelerator.backward(kept)
    with pytest.raises(type(error)):
        accelerator.backward(Interrupted.apply(1e6 * loss_of(model), error))
    if dropped:
        model.zero_grad()
    loss = loss_of(model, second)
    accelerator.backward(loss)
    optimizer.step()
    right = float(loss.detach()) + (0.0 if dropped else float(kept.detach()))
    assert taken_in(optimizer) == pytest.approx(right, rel=1e-12)


def test_a_state_that_is_loaded_between_micro_batches_leaves_the_loss(tmp_path):
    accelerator, model, optimizer, loss_of = problem()
    accelerator.save_state(tmp_path)
    first, second = loss_of(model, slice(0, 10)), loss_of(model, slice(10, 24))
    accelerator.backward(first)
    accelerator.load_state(tmp_path)
    accelerator.backward(loss_of(model, slice(10, 24)))
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(first.detach() + second.detach()), rel=1e-12)


def test_a_backward_pass_from_a_given_gradient_counts_as_it_is_scaled():
    accelerator, model, optimizer, loss_of = problem()
    loss = loss_of(model)
    accelerator.backward(loss, gradient=torch.tensor(0.25, dtype=torch.float64))
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(0.25 * float(loss.detach()), rel=1e-12)


@pytest.mark.parametrize("told", [True, False])
def test_gradients_that_were_scaled_by_hand_are_said_unless_told(told, caplog):
    accelerator, model, optimizer, loss_of = problem()
    for _ in range(2):
        accelerator.backward(loss_of(model))
        for p in model.parameters():
            p.grad.div_(4)
        if told:
            optimizer.set_clip_factor(0.25)
        optimizer.step()
        optimizer.zero_grad()
    assert sum("set_clip_factor" in r.message for r in caplog.records) == (not told)


def test_replaced_gradients_have_no_loss():
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="needs the loss.*zeroed or replaced"):
        optimizer.step()


def test_a_step_without_gradients_does_nothing_as_in_torch():
    accelerator, model, optimizer, loss_of = problem()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0
    accelerator.backward(loss_of(model))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(plain_steps(loss_of, steps=1)[0])


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(by_hand, caplog):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = CpuScaler()
    model, data = Net(), Points()
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=10.0))
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    for overflow in (True, False):
        loss = model(data.inputs, data.labels)["loss"]
        accelerator.backward(loss * (1e38 if overflow else 1.0))
        if overflow and by_hand:
            optimizer.set_loss(1e3)
        optimizer.step()
        assert accelerator.optimizer_step_was_skipped == overflow
        model.zero_grad(set_to_none=False)
    assert taken_in(optimizer) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert not caplog.records
