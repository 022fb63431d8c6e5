"""The averaged weights are what is saved, wherever and whenever a model is saved while its optimizer is in train mode. Expected
weights come from schedule-free AdamW in a bare loop, or from a run that calls `optimizer.eval()` by hand."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from momo_hf import MomoAdam
from tests.integrations.test_averaging import AT_THE_CAP, LR, close, free_run, rows, weights
from tests.integrations.test_transformers import PlainTrainer, arguments
from tests.toys import Net, Points


class Config(PretrainedConfig):
    model_type = "toy-saved"


class Pretrained(PreTrainedModel):
    config_class = Config

    def __init__(self, config=None):
        super().__init__(config or Config())
        self.net = Net(dtype=torch.float64)

    def forward(self, inputs, labels, **kwargs):
        return self.net(inputs, labels)


class Diffuser(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.net = Net(dtype=torch.float64)

    def forward(self, inputs, labels):
        return self.net(inputs, labels)


def adapted():
    torch.manual_seed(0)
    return get_peft_model(Pretrained(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])).double()


MODELS = {"transformers": Pretrained, "diffusers": Diffuser, "peft": adapted}
FILES = {
    "transformers": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "peft": "adapter_model.safetensors",
}


class Loop:
    """An accelerate loop, which calls neither `eval` nor `train` of the optimizer."""

    def __init__(self, kind="transformers"):
        self.accelerator, self.data = Accelerator(cpu=True), Points(dtype=torch.float64)
        model = MODELS[kind]()
        params = [p for p in model.parameters() if p.requires_grad]
        made = MomoAdam(params, lr=0.3, averaging=True)
        self.model, self.optimizer = self.accelerator.prepare(model, made)

    def train(self, steps):
        for step in steps:
            loss = self.model(self.data.inputs[rows(step)], self.data.labels[rows(step)])["loss"]
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def saved(self, folder, kind):
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        return load_file(folder / FILES[kind])


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def said(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


# ---- Loops ----


@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained_saves_the_average_and_leaves_training_as_it_was(kind, tmp_path, caplog):
    by_hand = Loop(kind).train(range(6))
    by_hand.optimizer.eval()
    expected = by_hand.saved(tmp_path / "by hand", kind)
    assert not caplog.records
    loop, undisturbed = Loop(kind).train(range(6)), Loop(kind).train(range(6))
    assert not equal(weights(loop.model), weights(by_hand.model))
    assert equal(loop.saved(tmp_path / "saved", kind), expected)
    assert equal(weights(loop.train(range(6, 9)).model), weights(undisturbed.train(range(6, 9)).model))
    assert len(said(caplog, "save optimizer.state_dict() beside them after optimizer.eval()")) == 1
    assert not said(caplog, "Something other")


def test_a_plain_loop_saves_the_average_too(tmp_path):
    averaged, _ = free_run(4, clip=1e9)
    model, data = Pretrained(), Points(dtype=torch.float64)
    optimizer = MomoAdam(model.parameters(), lr=LR, averaging=0.9, divide=False, lb=-1e6)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(data.inputs[rows(step)], data.labels[rows(step)])["loss"]
        loss.backward()
        optimizer.step(loss=loss)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert close({name.removeprefix("net."): value for name, value in found.items()}, averaged[4])


def test_get_state_dict_gives_copies_of_the_average(caplog):
    loop, by_hand = Loop().train(range(6)), Loop().train(range(6))
    by_hand.optimizer.eval()
    loop.model.net.tied = loop.model.net.first.weight
    before = weights(loop.model)
    found = loop.accelerator.get_state_dict(loop.model)
    assert found.pop("net.tied").data_ptr() == found["net.first.weight"].data_ptr()  # files hold it once
    expected = weights(by_hand.model)
    assert equal(found, expected) and equal(weights(loop.model), before)
    loop.train(range(6, 8))
    assert equal(found, expected)
    assert len(said(caplog, "averaged weights of a Pretrained")) == 1


def test_other_optimizers_and_models_are_left_alone(tmp_path, caplog):
    accelerator, model, other = Accelerator(cpu=True), Pretrained(), Pretrained()
    model, other, optimizer = accelerator.prepare(model, other, torch.optim.AdamW(model.parameters()))
    Loop().train(range(2))
    accelerator.get_state_dict(model)
    for which in (model, other):
        which.save_pretrained(tmp_path)
        which.eval()
        which.state_dict()
        assert equal(load_file(tmp_path / "model.safetensors"), weights(which))
    assert not caplog.records


# ---- Beside the state of the optimizer ----


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_whose_hook_saves_the_model_resumes_bit_for_bit(mode, tmp_path, caplog):
    """As the scripts of diffusers do it: model files by `save_pretrained`, beside an optimizer in whatever mode."""

    def save(models, saved, folder):
        models[0].save_pretrained(f"{folder}/model")
        saved.clear()

    def load(models, folder):
        models.pop().load_state_dict(load_file(f"{folder}/model/model.safetensors"))

    loops = [Loop(), Loop()]
    for loop in loops:
        loop.accelerator.register_save_state_pre_hook(save)
        loop.accelerator.register_load_state_pre_hook(load)
    loops[0].train(range(5))
    getattr(loops[0].optimizer, mode)()
    loops[0].accelerator.save_state(tmp_path)
    loops[1].accelerator.load_state(tmp_path)
    assert len(said(caplog, "point where gradients are taken, to resume from")) == (mode == "train")
    for loop in loops:
        loop.optimizer.train()
        loop.train(range(5, 9))
    assert equal(*(weights(loop.model) for loop in loops))


@pytest.mark.parametrize("of_state, of_loop", [("train", "eval"), ("eval", "train")])
def test_after_the_state_of_the_other_mode_was_loaded_the_average_is_saved(of_state, of_loop, tmp_path, caplog):
    loop, resumed = Loop().train(range(5)), Loop().train(range(2))
    getattr(loop.optimizer, of_state)()
    loop.accelerator.save_state(tmp_path / "state")
    getattr(resumed.optimizer, of_loop)()
    resumed.accelerator.load_state(tmp_path / "state")
    assert not caplog.records
    found = resumed.saved(tmp_path / "resumed", "transformers")
    loop.optimizer.eval()
    assert equal(found, weights(loop.model))


# ---- Callbacks of a Trainer ----

EVENTS = ("on_step_end", "on_save", "on_epoch_end", "on_train_end", "on_log", "on_optimizer_step")


def saves_on(event):
    def save(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(f"{args.output_dir}/{event}-{state.global_step}")

    return save


Saver = type("Saver", (TrainerCallback,), {event: saves_on(event) for event in EVENTS})


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_what_callbacks_save_is_the_average(eval_strategy, tmp_path):
    averaged, _ = free_run(8)
    args = arguments(
        tmp_path, learning_rate=LR, max_steps=8, optim_args=AT_THE_CAP, label_names=["labels"], save_strategy="steps",
        save_steps=2, eval_strategy=eval_strategy, eval_steps=4, logging_steps=3,
    )  # fmt: skip
    data = Points(dtype=torch.float64)
    trainer = PlainTrainer(Pretrained(), args, train_dataset=data, eval_dataset=data, callbacks=[Saver()])
    trainer.train()
    found = {path.name: load_file(path / "model.safetensors") for path in tmp_path.glob("*-*") if path.is_dir()}
    events = {name.rpartition("-")[0] for name in found}
    assert events == {*EVENTS, "checkpoint"}
    for name, tensors in found.items():
        # The callback of an optimizer's step comes before the step is counted.
        step = int(name.rpartition("-")[2]) + name.startswith("on_optimizer_step")
        assert close({key.removeprefix("net."): value for key, value in tensors.items()}, averaged[step]), name


# ---- Models that leave whole ----


@pytest.mark.parametrize("leave", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_is_copied_needs_nothing_of_ours(leave):
    loop = Loop().train(range(3))
    with torch.no_grad():
        loop.model.eval()
        loop.optimizer.eval()
        loop.model(loop.data.inputs, loop.data.labels)
    other = leave(loop.model)
    assert "momo_hf" not in str(pickle.dumps(other.net))
    assert not any(module._forward_pre_hooks for module in other.modules() if isinstance(module, nn.Module))
