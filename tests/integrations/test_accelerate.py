"""The loss through any Accelerator: sums, clipping, skipped steps, wrong wiring."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import momo_hf
from momo_hf import Momo, MomoAdam
from tests.toys import Net, Points


def run_loop(accumulation=1, batch=12, steps=6, clip=None, cls=MomoAdam, rows=24, **options):
    """A loop as accelerate's examples write it; returns the model and the step sizes."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    model = Net(dtype=torch.float64)
    optimizer = cls(model.parameters(), **{"lr": 10.0, **options})
    data = DataLoader(Points(rows, dtype=torch.float64), batch_size=batch // accumulation)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    taus = []
    while len(taus) < steps:
        for row in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(**row)["loss"])
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                if accelerator.sync_gradients:
                    taus.append(float(optimizer.param_groups[0]["effective_lr"]))
                optimizer.zero_grad()
    return model, torch.tensor(taus[:steps], dtype=torch.float64)


def run_plain(batch=12, steps=6, clip=None, cls=MomoAdam, **options):
    """The same without accelerate, the loss given by hand."""
    model = Net(dtype=torch.float64)
    optimizer = cls(model.parameters(), **{"lr": 10.0, **options})
    data, taus = Points(dtype=torch.float64), []
    for step in range(steps):
        rows = slice(step * batch % 24, step * batch % 24 + batch)
        optimizer.zero_grad()
        loss = model(data.inputs[rows], data.labels[rows])["loss"]
        loss.backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.set_clip_factor(clip / (norm + 1e-6))
        optimizer.step(loss=loss)
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
    return model, torch.tensor(taus, dtype=torch.float64)


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_loop_gets_the_loss_and_the_clip_factor(cls, accumulation, clip):
    _, expected = run_plain(cls=cls, clip=clip)
    _, taus = run_loop(accumulation, cls=cls, clip=clip)
    assert expected.unique().numel() == len(expected)
    torch.testing.assert_close(taus, expected, rtol=1e-10, atol=0)


def test_an_incomplete_last_window_is_divided_as_its_gradient():
    """20 rows in batches of 3, accumulated by 2: the last window holds 1 batch of 2, divided by 2 all the same."""
    data = Points(20, dtype=torch.float64)
    model = Net(dtype=torch.float64)
    optimizer = MomoAdam(model.parameters(), lr=10.0)
    expected = []
    for start in range(0, 20, 6):
        optimizer.zero_grad()
        total = 0.0
        for begin in range(start, min(start + 6, 20), 3):
            loss = model(data.inputs[begin : begin + 3][: 20 - begin], data.labels[begin : begin + 3])["loss"] / 2
            loss.backward()
            total += loss.detach()
        optimizer.step(loss=total)
        expected.append(float(optimizer.param_groups[0]["effective_lr"]))
    _, taus = run_loop(2, batch=6, steps=4, rows=20)
    torch.testing.assert_close(taus.tolist(), expected, rtol=1e-10, atol=0)


def test_several_losses_of_one_step_add_up():
    accelerator = Accelerator(cpu=True)
    data, model = Points(dtype=torch.float64), Net(dtype=torch.float64)
    twin = Net(dtype=torch.float64)
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=10.0))
    reference = MomoAdam(twin.parameters(), lr=10.0)
    first, second = (
        lambda m: m(data.inputs[:8], data.labels[:8])["loss"],
        lambda m: m(data.inputs[8:], data.labels[8:])["loss"],
    )
    accelerator.backward(first(model))
    accelerator.backward(second(model))
    optimizer.step()
    loss = first(twin) + second(twin)
    loss.backward()
    reference.step(loss=loss)
    torch.testing.assert_close(optimizer.param_groups[0]["effective_lr"], reference.param_groups[0]["effective_lr"])


def test_zeroed_gradients_take_their_loss_with_them():
    accelerator = Accelerator(cpu=True)
    data, model = Points(dtype=torch.float64), Net(dtype=torch.float64)
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=10.0))
    accelerator.backward(1e6 * model(data.inputs, data.labels)["loss"])
    optimizer.zero_grad()
    loss = model(data.inputs, data.labels)["loss"]
    accelerator.backward(loss)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.param_groups[0]["loss_avg"]), 0.1 * float(loss.detach()))


def test_other_optimizers_are_left_alone():
    runs = []
    for wrapped in (True, False):
        accelerator = Accelerator(cpu=True)
        model, data = Net(), Points()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        assert momo_hf.momo_metrics(optimizer) == {}
        for _ in range(3):
            loss = model(data.inputs, data.labels)["loss"]
            accelerator.backward(loss) if wrapped else loss.backward()
            if wrapped:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                accelerator.clip_grad_value_(model.parameters(), 0.01)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.first.weight.detach())
    assert torch.equal(*runs)


class CpuScaler(torch.amp.GradScaler):
    """A loss scaler on the CPU, as accelerate makes one on a GPU."""

    def __init__(self):
        super().__init__("cpu", init_scale=2.0**10, growth_interval=1000)


def scaled_loop(overflow_at=None):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = CpuScaler()
    model, data = Net(), Points()
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=10.0))
    # accelerate itself makes a scaler on accelerators only; from here on it behaves as with mixed_precision="fp16".
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    taus = []
    for step in range(6):
        loss = model(data.inputs, data.labels)["loss"]
        accelerator.backward(loss)
        if step == overflow_at:
            model.first.weight.grad[0, 0] = float("inf")
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        before = {name: float(optimizer.param_groups[0][name]) for name in ("step", "loss_avg", "skipped")}
        weight = model.first.weight.detach().clone()
        optimizer.step()
        assert accelerator.optimizer_step_was_skipped == (step == overflow_at)
        if step == overflow_at:
            assert before == {name: float(optimizer.param_groups[0][name]) for name in before}
            assert torch.equal(weight, model.first.weight)
        else:
            taus.append(float(optimizer.param_groups[0]["effective_lr"]))
        optimizer.zero_grad()
    return taus


def test_fp16_loss_scaling_is_in_neither_loss_nor_gradient():
    accelerator = Accelerator(cpu=True)
    model, data = Net(), Points()
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=10.0))
    expected = []
    for _ in range(6):
        accelerator.backward(model(data.inputs, data.labels)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(optimizer.param_groups[0]["effective_lr"]))
    torch.testing.assert_close(scaled_loop(), expected, rtol=1e-5, atol=0)
    # An overflow in the middle loses that step and nothing else; its loss is not added to the next.
    torch.testing.assert_close(scaled_loop(overflow_at=2), expected[:5], rtol=1e-5, atol=0)


def test_losses_that_are_not_one_number_are_named():
    accelerator = Accelerator(cpu=True)
    model, data = Net(), Points()
    model, _ = accelerator.prepare(model, MomoAdam(model.parameters()))
    with pytest.raises(ValueError, match=r"shape \(72,\).*loss.mean"):
        accelerator.backward(model.errors(data.inputs, data.labels))


def test_bf16_autocast_trains():
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, data = Net(), Points()
    model, optimizer = accelerator.prepare(model, MomoAdam(model.parameters(), lr=0.05))
    losses = []
    for _ in range(150):
        loss = model(data.inputs, data.labels)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
