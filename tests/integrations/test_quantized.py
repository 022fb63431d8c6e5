"""Layers that are quantized: adapters on them train, and what cannot be trained is refused by its name."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

from momo_hf import Momo, MomoAdam, MomoMuon, muon_groups
from tests.integrations.test_ecosystem import arguments, history, sentences


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["momo_adam", "momo_muon"])
def test_lora_on_quantized_layers_trains_its_adapters_only(tmp_path, name, bits):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "model")
    quantized = LlamaForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map={"": "cpu"},
    )
    quantized = prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(quantized, adapters)
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    assert any(not p.is_floating_point() for p in before.values())
    trainer = Trainer(model, arguments(tmp_path, optim=name), train_dataset=sentences())
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < 0.9 * losses[0]
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != ("lora_" in n or "modules_to_save" in n), n


@pytest.mark.parametrize("make", [Momo, MomoAdam, MomoMuon])
def test_packed_weights_that_are_to_be_trained_are_refused_by_name(make):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = nn.Parameter(TwoTensor(torch.zeros(32, 32), torch.zeros(32, 32)))
    with pytest.raises(ValueError, match=r"1\.weight is to be trained and is a TwoTensor, .* freeze it"):
        muon_groups(model)
    with pytest.raises(ValueError, match="parameter 2 of the group is .* TwoTensor"):
        make(model.parameters())
    optimizer = make(model[0].parameters())
    with pytest.raises(ValueError, match="parameter 0 of the group"):
        optimizer.add_param_group({"params": [model[1].weight]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [Momo, MomoAdam, MomoMuon])
def test_packed_weights_that_are_frozen_are_left_alone(make):
    packed = nn.Parameter(TwoTensor(torch.ones(32, 32), torch.ones(32, 32)), requires_grad=False)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = packed
    assert id(packed) not in {id(p) for group in muon_groups(model) for p in group["params"]}
    optimizer, before = make(model.parameters()), model[0].weight.detach().clone()
    loss = model[0](torch.ones(4, 32)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert not torch.equal(model[0].weight, before) and torch.equal(packed.a, torch.ones(32, 32))
