"""How long a loss, its clips and its factors live: as long as the gradients that they belong to."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from momo_hf import MomoAdam
from tests.integrations.loops import problem, taken_in
from tests.integrations.test_accelerate import CpuScaler
from tests.toys import Net, Points


FIRST, SECOND = slice(0, 10), slice(10, 24)


def test_a_clip_goes_with_the_gradients_that_are_zeroed_in_place():
    """The loss of the next ones is given by hand, so that no backward pass of accelerate begins a new sum."""
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.zero_grad(set_to_none=False)
    accelerator.clip_grad_norm_(model.parameters(), 1e6)  # looks at them, and clips nothing
    loss = loss_of(model)
    loss.backward()
    optimizer.step(loss=loss)
    assert taken_in(optimizer) == pytest.approx(float(loss.detach()), rel=1e-12)


def test_gradients_that_a_failed_backward_pass_has_added_to_are_kept_without_a_word(caplog):
    """The output layer has its gradient before the pass fails in front of it."""
    accelerator, model, optimizer, loss_of = problem()
    kept = loss_of(model, FIRST)
    accelerator.backward(kept)

    def fail(grad):
        raise RuntimeError("out of memory")

    outputs = model.first(Points(dtype=torch.float64).inputs)
    outputs.register_hook(fail)
    before = model.second.weight.grad.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerator.backward(model.second(torch.tanh(outputs)).square().mean())
    assert not torch.equal(model.second.weight.grad, before)
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(kept.detach()), rel=1e-12)
    assert not caplog.records


def test_gradients_that_nobody_drops_keep_a_factor_that_was_given_by_hand():
    accelerator, model, optimizer, loss_of = problem()
    first, second = loss_of(model, FIRST), loss_of(model, SECOND)
    accelerator.backward(first)
    torch._foreach_mul_([p.grad for p in model.parameters()], 0.25)
    optimizer.set_clip_factor(0.25)
    optimizer.step()
    before = float(optimizer.param_groups[0]["loss_avg"])
    second = loss_of(model, SECOND)
    accelerator.backward(second)
    optimizer.step()
    found = (float(optimizer.param_groups[0]["loss_avg"]) - 0.9 * before) / 0.1
    assert found == pytest.approx(float(0.25 * first.detach() + second.detach()), rel=1e-12)


@pytest.mark.parametrize("far", [1e-3, 1e9])
def test_a_search_hears_of_skipped_steps_whose_losses_were_given_by_hand(far):
    """Beyond `far` losses are infinite, and the loss scaler skips every step: the search must go back."""
    accelerator, scaler = Accelerator(cpu=True), CpuScaler()
    accelerator.scaler = scaler
    model, data = Net(), Points()
    made = MomoAdam(model.parameters(), lr="auto")
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    model, optimizer = accelerator.prepare(model, made)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    for _ in range(50):
        moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
        loss = model(data.inputs, data.labels)["loss"] * (torch.inf if moved.abs().max() > far else 1.0)
        scaler.scale(loss).backward()  # past accelerate
        optimizer.set_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    ended = optimizer.search.reason == "the loss or a gradient was not finite"
    assert ended == (far < 1)
    assert not ended or made.param_groups[0]["step"] > 0


@pytest.fixture
def one_process():
    """A process group, which FSDP2 asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parts_that_are_sharded_apart_take_in_their_own_losses(one_process):
    """FSDP2 keeps what it has not averaged yet apart from the gradients, for every part by itself."""
    model, inputs = Net(dtype=torch.float64), Points(dtype=torch.float64).inputs
    made = []
    for part in (model.first, model.second):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        made.append(MomoAdam(part.parameters(), lr=1e-2))
    accelerator = Accelerator(cpu=True)
    model, *optimizers = accelerator.prepare(model, *made)
    for step, optimizer in enumerate(optimizers):
        taken = 0.0
        for averages in (False, True):
            for part in (model.first, model.second):
                part.set_requires_gradient_sync(averages)
            hidden = model.first(inputs)
            loss = hidden.square().mean() if step == 0 else model.second(hidden.detach()).square().mean()
            accelerator.backward(loss)
            taken += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        assert taken_in(optimizer) == pytest.approx(taken, rel=1e-12)
