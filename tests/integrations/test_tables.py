"""Embeddings are found in the models that accelerate and Trainer prepare."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer

from momo_hf import MomoAdam, mark_tables
from tests.integrations.test_transformers import arguments


def tables(model, optimizer, kind="tables"):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(g["params"][i])] for g in optimizer.param_groups for i in g.get(kind, ())}


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes))


def gpt2():
    """Its table of words is the output layer too."""
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=30))


BERTS = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}


@pytest.mark.parametrize(
    "optim, expected", [("momo_adam_auto", BERTS), ("momo_muon_auto", BERTS), ("momo_adam", set())]
)
def test_trainer_finds_them(optim, expected, tmp_path):
    model = bert()
    data = [{"input_ids": torch.arange(i, i + 4), "labels": i % 2} for i in range(8)]
    args = arguments(tmp_path, optim=optim, learning_rate=1e-3, max_steps=2)
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    assert tables(model, trainer.optimizer) == expected


@pytest.mark.parametrize("order", ["together", "model first", "optimizer first"])
@pytest.mark.parametrize("make, expected", [(bert, BERTS), (gpt2, {"transformer.wpe.weight"})])
def test_accelerate_finds_them(order, make, expected):
    accelerator, model = Accelerator(cpu=True), make()
    made, other = MomoAdam(model.parameters(), averaging=True), nn.Linear(2, 2)
    if order == "together":
        accelerator.prepare(other, model, made)
    else:
        for one in (model, made) if order == "model first" else (made, model):
            accelerator.prepare(one)
    assert tables(model, made) == expected
    tied = {"transformer.wte.weight"} if make is gpt2 else set()
    assert tables(model, made, "embeddings") == expected | tied


def test_a_loop_marks_them_itself_in_whatever_it_has():
    model, accelerator = bert(), Accelerator(cpu=True)
    prepared = accelerator.prepare(MomoAdam(model.parameters(), averaging=True))
    mark_tables(model, prepared)
    assert tables(model, prepared) == BERTS
    mark_tables(model, torch.optim.AdamW(model.parameters()))
