"""What is wired wrongly, or cannot be right, is refused with the fix; and the wiring itself."""

import copy
import importlib
import types

import pytest
from accelerate import Accelerator, DistributedType
from accelerate import accelerator as module_of_accelerate

from momo_hf import MomoAdam
from momo_hf.integrations import accelerate as wiring
from tests.integrations.loops import problem, taken_in
from tests.toys import Net, Points


def test_fsdp1_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    model, data = Net(), Points()
    model, _ = accelerator.prepare(model, MomoAdam(model.parameters()))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(ValueError, match="`fsdp_version: 2`"):
        accelerator.backward(model(data.inputs, data.labels)["loss"])


def test_an_optimizer_replaced_after_prepare_says_how_to_wire_it():
    accelerator = Accelerator(cpu=True)
    model, data = Net(), Points()
    model, _ = accelerator.prepare(model, MomoAdam(model.parameters()))
    replacement = MomoAdam(model.parameters())
    accelerator.backward(model(data.inputs, data.labels)["loss"])
    with pytest.raises(RuntimeError, match="needs the loss.*prepared this optimizer"):
        replacement.step()


def test_clip_grad_value_is_refused():
    accelerator = Accelerator(cpu=True)
    model, data = Net(), Points()
    model, _ = accelerator.prepare(model, MomoAdam(model.parameters()))
    accelerator.backward(model(data.inputs, data.labels)["loss"])
    with pytest.raises(ValueError, match="clip_value=0.1.*clip_grad_norm_"):
        accelerator.clip_grad_value_(model.parameters(), 0.1)


def test_the_package_wires_accelerate_once():
    def wired():
        # The second one is there with DeepSpeed.
        return Accelerator.backward, getattr(module_of_accelerate, "map_pytorch_optim_to_deepspeed", None)

    before = wired()
    wiring.install()
    assert wired() == before


def test_a_module_that_is_loaded_again_counts_losses_once():
    importlib.reload(wiring).install()
    wiring.install()
    accelerator, model, optimizer, loss_of = problem()
    loss = loss_of(model)
    accelerator.backward(loss)
    optimizer.step()
    assert taken_in(optimizer) == pytest.approx(float(loss.detach()))


def test_a_wrapper_around_ours_is_left_in_place(monkeypatch):
    calls, ours = [], Accelerator.backward

    def backward(self, loss, **kwargs):
        calls.append(float(loss.detach()))
        return ours(self, loss, **kwargs)

    backward.__wrapped__ = ours
    monkeypatch.setattr(Accelerator, "backward", backward)
    wiring.install()
    assert Accelerator.backward is backward
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    optimizer.step()
    assert calls == [pytest.approx(taken_in(optimizer))]


@pytest.mark.parametrize(
    "kind, option", [("pipeline", {"pp_size": 2}), ("expert", {"ep_size": 4}), (None, {"pp_size": 1, "ep_size": None})]
)
def test_parallelism_without_one_sum_is_refused(kind, option):
    accelerator, model, optimizer, loss_of = problem()
    model.config = types.SimpleNamespace(distributed_config=types.SimpleNamespace(**option))
    if kind is None:
        accelerator.backward(loss_of(model))
        return
    with pytest.raises(ValueError, match=f"does not run under {kind} parallelism.*FSDP2"):
        accelerator.backward(loss_of(model))


def test_experts_of_deepspeed_are_refused():
    accelerator, model, optimizer, loss_of = problem()
    model.second.weight.allreduce = False
    with pytest.raises(ValueError, match="expert parallelism"):
        accelerator.backward(loss_of(model))


def test_megatron_is_refused(monkeypatch):
    accelerator, model, optimizer, loss_of = problem()
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="Megatron-LM"):
        accelerator.backward(loss_of(model))


def test_an_accelerator_that_is_gone_leaves_the_optimizer_usable():
    accelerator, model, optimizer, loss_of = problem()
    inner = optimizer.optimizer
    accelerator.free_memory()
    del accelerator, optimizer
    loss = loss_of(model)
    loss.backward()
    inner.step(loss=loss)
    assert taken_in(inner) == pytest.approx(float(loss.detach()))


def test_a_copy_of_an_optimizer_starts_without_a_loss():
    accelerator, model, optimizer, loss_of = problem()
    accelerator.backward(loss_of(model))
    twin = copy.deepcopy(optimizer.optimizer)
    assert twin.loss_source is None and not twin.has_loss
