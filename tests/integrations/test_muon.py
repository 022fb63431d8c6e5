"""Which parameters Muon gets from a model, and the names of its optimizers in a Trainer."""

import logging

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from momo_hf import MomoMuon, muon_groups


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=64))


def marian():
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MarianConfig(vocab_size=64, d_model=32, pad_token_id=0, decoder_start_token_id=0, **sizes, **heads)
    return MarianMTModel(config)


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=20, **sizes))


def unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    return UNet2DModel(sample_size=8, block_out_channels=(16,), layers_per_block=1, **blocks)


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=4, norm_num_groups=4
    )


def lora():
    return get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def wide_lora():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=128, n_head=2, n_positions=16, vocab_size=64))
    return get_peft_model(model, LoraConfig(r=16, target_modules=["c_attn"], fan_in_fan_out=True))


def experts():
    # So many that their stack would pass for the kernel of a convolution.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def several_outputs():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 64}
    return MusicgenForCausalLM(MusicgenDecoderConfig(num_codebooks=2, **sizes))


def plain():
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 20))


def muons(model):
    """The names of Muon's parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in muon_groups(model) if group["method"] == "muon" for p in group["params"]}


@pytest.mark.parametrize(
    "make, inside, outside",
    [
        (gpt2, ["h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"], ["wte.weight", "wpe.weight", "ln_f.weight"]),
        (marian, ["encoder.layers.0.fc1.weight", "encoder_attn.q_proj.weight"], ["shared.weight", "embed_positions"]),
        (vit, ["patch_embeddings.projection.weight"], ["classifier.weight", "cls_token"]),
        (unet, ["resnets.0.conv1.weight", "linear_1.weight"], ["conv_out.weight", "norm1.weight"]),
        (
            dit,
            ["attn1.to_q.weight", "ff.net.2.weight"],
            ["proj_out_2.weight", "class_embedder.embedding_table.weight"],
        ),
        (lora, [], ["lora_A", "lora_B"]),
        (wide_lora, [], ["lora_A", "lora_B"]),
        (experts, ["self_attn.q_proj.weight"], ["experts.gate_up_proj", "experts.down_proj", "lm_head.weight"]),
        (several_outputs, ["self_attn.q_proj.weight", "fc1.weight"], ["lm_heads.0.weight", "lm_heads.1.weight"]),
        (plain, ["1.weight"], ["0.weight", "2.weight", "3.weight"]),
    ],
)
def test_hidden_matrices_are_muons_and_all_else_is_adams(make, inside, outside):
    model = make()
    found = muons(model)
    for name in inside:
        assert any(name in one for one in found), name
    for name in outside:
        assert not any(name in one for one in found), name
    assert all(model.get_parameter(name).dim() > 1 for name in found)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(p) for group in muon_groups(model) for p in group["params"])


def test_a_model_that_is_wrapped_for_several_devices_has_the_same_groups():
    model = gpt2()
    assert {f"module.{name}" for name in muons(model)} == muons(nn.DataParallel(model))


def test_what_decays_is_what_decays_under_trainer(tmp_path):
    model = gpt2()
    names = Trainer(model=model, args=TrainingArguments(tmp_path, report_to=[])).get_decay_parameter_names(model)
    expected = {id(p) for name, p in model.named_parameters() if name in names}
    groups = muon_groups(model, weight_decay=0.1)
    assert {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]} == expected
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


def test_frozen_parameters_are_left_out_and_dtypes_without_steps_refused():
    model = plain()
    model[1].requires_grad_(False)
    assert muons(model) == set()
    model[1].weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"1\.weight is to be trained and has dtype torch.complex64"):
        muon_groups(model)


@pytest.mark.parametrize("name, options", [("momo_muon", {"learning_rate": 0.01}), ("momo_muon_auto", {})])
@pytest.mark.parametrize("make", [gpt2, lora])
def test_the_name_alone_is_enough_in_a_trainer(tmp_path, caplog, name, options, make):
    rows = [{"input_ids": torch.arange(8) % 5, "labels": torch.arange(8) % 5}] * 8
    args = TrainingArguments(
        tmp_path, optim=name, max_steps=3, logging_steps=1, report_to=[], weight_decay=0.1, **options
    )
    trainer = Trainer(model=make(), args=args, train_dataset=rows)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MomoMuon)
    size = sum(p.numel() for group in optimizer.param_groups if group["method"] == "muon" for p in group["params"])
    assert (size > 0) == (make is gpt2)
    if not options:
        assert optimizer.averages and optimizer.searching
        return
    assert f"Muon for {size:,} parameters" in caplog.text
