"""`optim="momo"` and the like wherever transformers takes the name of an optimizer, and their arguments."""

import json
import logging

import pytest
import torch
import yaml
from transformers import HfArgumentParser, Trainer, TrainingArguments

from tests.integrations.test_transformers import METHODS, arguments
from tests.toys import Net, Points


@pytest.mark.parametrize("name", METHODS)
def test_the_name_is_valid_everywhere(name, tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    plain = {"output_dir": str(tmp_path), "optim": name, "use_cpu": True}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "a.json").write_text(json.dumps(plain))
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", name]
    made = [
        TrainingArguments(**plain),
        parser.parse_args_into_dataclasses(line)[0],
        parser.parse_yaml_file(tmp_path / "a.yaml")[0],
        parser.parse_json_file(tmp_path / "a.json")[0],
        TrainingArguments(str(tmp_path), use_cpu=True).set_optimizer(name, learning_rate=0.1),
    ]
    torch.save(made[0], tmp_path / "training_args.bin")
    made.append(torch.load(tmp_path / "training_args.bin", weights_only=False))
    for args in made:
        assert args.optim.value == name and args.to_dict()["optim"] == name
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert cls is METHODS[name][0] and METHODS[name][1].items() <= kwargs.items()


def test_a_wrong_name_lists_ours():
    with pytest.raises(ValueError, match="momo_adam"):
        TrainingArguments("out", optim="momo_adm")


def test_arguments_map_onto_the_optimizer(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=0.3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        optim_args="lb=0.5, use_fstar=true, divide=False",
    )
    trainer = Trainer(Net(), args, train_dataset=Points())
    first, second = trainer.create_optimizer().param_groups
    expected = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-6, "lb": 0.5, "use_fstar": True, "divide": False}
    for group in (first, second):
        assert {key: group[key] for key in expected} == expected
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    args = arguments(tmp_path, optim="momo", learning_rate=0.3, adam_beta1=0.8, optim_args="bias_correction=1,lb=-2")
    group = Trainer(Net(), args, train_dataset=Points()).create_optimizer().param_groups[0]
    assert (group["lr"], group["beta"], group["bias_correction"], group["lb"]) == (0.3, 0.8, True, -2.0)


def test_under_deepspeed_there_is_one_group_and_a_word_about_its_decay(tmp_path, caplog):
    args, model = arguments(tmp_path, weight_decay=0.1), Net()
    args.deepspeed_plugin = object()
    with caplog.at_level(logging.WARNING):
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert kwargs["params"] == list(model.parameters()) and kwargs["weight_decay"] == 0.1
    assert sum("weight_decay=0.1 acts on biases" in r.message for r in caplog.records) == 1


def test_under_deepspeed_the_automatic_one_searches_and_does_not_average(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), optim="momo_adam_auto", use_cpu=True)
    args.deepspeed_plugin = object()
    with caplog.at_level(logging.WARNING):
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, Net())
    assert kwargs["lr"] == "auto" and kwargs["averaging"] is False
    assert sum("iterates are not averaged" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("optim", ["momo", "momo_adam", "momo_adam_auto"])
def test_any_of_them_searches_and_averages_where_its_arguments_say_so(optim, tmp_path, caplog):
    args = arguments(tmp_path, optim=optim, learning_rate=0.3, optim_args="lr=auto, averaging=true")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(Net(), args, train_dataset=Points())
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is METHODS[optim][0] and optimizer.search is not None and optimizer.averages
    assert sum("learning_rate=0.3 is not used" in r.message for r in caplog.records) == 1
    args = TrainingArguments(str(tmp_path), optim=optim, optim_args="lr=auto,averaging=false", use_cpu=True)
    optimizer = Trainer(Net(), args, train_dataset=Points()).create_optimizer()
    assert optimizer.search is not None and not optimizer.averages


@pytest.mark.parametrize(
    "text, message",
    [
        ("lbb=1", "no key 'lbb' for MomoAdam; it takes lr=auto, lb, divide, use_fstar"),
        ("lr=1", "no key 'lr'.*TrainingArguments of their own"),
        ("lb=low", "lb must be a number, got 'low'"),
        ("foreach=yes please", "foreach must be true or false, got 'yesplease'"),
    ],
)
def test_wrong_optim_args_are_named(text, message, tmp_path):
    args = arguments(tmp_path, optim_args=text)
    with pytest.raises(ValueError, match=message):
        Trainer(Net(), args, train_dataset=Points()).create_optimizer()


@pytest.mark.parametrize("optim", METHODS)
def test_low_rank_projections_are_refused(optim, tmp_path):
    args = arguments(tmp_path, optim=optim, optim_target_modules=["attn"])
    with pytest.raises(ValueError, match=r"optim_target_modules=\['attn'\].*Leave it out"):
        Trainer(Net(), args, train_dataset=Points()).create_optimizer()
