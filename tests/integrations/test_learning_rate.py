"""Whether somebody chose the learning rate, and what is said about it as the cap of the steps."""

import copy
import json
import logging
from dataclasses import dataclass

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

from momo_hf import Momo, MomoAdam, MomoMuon, MomoTrainer
from momo_hf.integrations.learning_rate import cap_of, learning_rate_unset
from tests.integrations.test_transformers import arguments
from tests.toys import Net, Points


@dataclass
class OtherArguments(TrainingArguments):
    learning_rate: float = 2e-5


KINDS = {TrainingArguments: 5e-5, OtherArguments: 2e-5}


def loaded(args, folder):
    torch.save(args, folder / "training_args.bin")
    return torch.load(folder / "training_args.bin", weights_only=False)


@pytest.mark.parametrize("cls", KINDS)
def test_a_number_that_was_given_is_a_choice_even_where_it_is_the_default(cls, tmp_path):
    given, parser = {"output_dir": str(tmp_path), "use_cpu": True}, HfArgumentParser(cls)
    line = ["--output_dir", str(tmp_path), "--use_cpu"]
    lr = float(str(KINDS[cls]))

    def from_json(options):
        (tmp_path / "a.json").write_text(json.dumps(options))
        return parser.parse_json_file(tmp_path / "a.json")[0]

    def from_yaml(options):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(options))
        return parser.parse_yaml_file(tmp_path / "a.yaml")[0]

    alone = [
        cls(**given), parser.parse_args_into_dataclasses(line)[0], from_json(given), from_yaml(given),
        copy.deepcopy(cls(**given)), cls(**given).set_optimizer("momo_adam_auto"), loaded(cls(**given), tmp_path),
    ]  # fmt: skip
    chosen = [
        cls(**given, learning_rate=lr), parser.parse_args_into_dataclasses([*line, "--learning_rate", str(lr)])[0],
        from_json({**given, "learning_rate": lr}), from_yaml({**given, "learning_rate": lr}),
        copy.deepcopy(cls(**given, learning_rate=lr)), loaded(cls(**given, learning_rate=3 * lr), tmp_path),
        cls(**given, learning_rate=1e-2), cls(**given, learning_rate=7e-5),
    ]  # fmt: skip
    assert [learning_rate_unset(args) for args in alone] == [True] * len(alone)
    assert [learning_rate_unset(args) for args in chosen] == [False] * len(chosen)


def test_a_default_that_was_copied_into_another_class_is_no_choice(tmp_path):
    """As trl's SFTTrainer does with a TrainingArguments."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    copied = OtherArguments(str(tmp_path), use_cpu=True, learning_rate=args.to_dict()["learning_rate"])
    assert copied.learning_rate == 5e-5 and learning_rate_unset(copied)


# ---- What is said ----


def untouched(tmp_path, cls=TrainingArguments, optim="momo_adam", max_steps=6, **options):
    return cls(
        str(tmp_path), optim=optim, use_cpu=True, max_steps=max_steps, report_to="none", save_strategy="no",
        per_device_train_batch_size=8, **options,
    )  # fmt: skip


def said(caplog, args, model=None, data=None, **options):
    """What a run says, without the summary that every run gives; its optimizer."""
    caplog.clear()
    trainer = Trainer(model or Net(), args, train_dataset=data or Points(), **options)
    with caplog.at_level(logging.WARNING, logger="momo_hf"):
        trainer.train()
    lines = [r.message for r in caplog.records if r.name.startswith("momo_hf")]
    (summary,) = [line for line in lines if "used step sizes" in line]
    return [line for line in lines if line is not summary], summary, trainer.optimizer.optimizer


@pytest.mark.parametrize("cls", KINDS)
def test_a_default_is_named_with_its_class_and_once(cls, tmp_path, caplog):
    (line,), summary, optimizer = said(caplog, untouched(tmp_path, cls))
    assert f"left at {KINDS[cls]:g}, the default of {cls.__name__}" in line
    assert "try learning_rate=0.01, the default of MomoAdam" in line and "momo_adam_auto" not in summary
    assert cap_of(optimizer) == KINDS[cls]
    (line,), summary, _ = said(caplog, untouched(tmp_path, cls, optim="momo"))
    assert "try learning_rate=1, the default of Momo, or" in line


def test_a_default_is_named_with_the_class_that_it_is_from(tmp_path, caplog):
    copied = untouched(tmp_path, OtherArguments, learning_rate=TrainingArguments.learning_rate)
    (line,), _, _ = said(caplog, copied)
    assert "left at 5e-05, the default of TrainingArguments" in line


@pytest.mark.parametrize("cls", KINDS)
def test_the_automatic_one_takes_no_default_for_a_cap(cls, tmp_path, caplog):
    lines, summary, optimizer = said(caplog, untouched(tmp_path, cls, optim="momo_adam_auto", max_steps=70))
    search = optimizer.search
    assert lines == [] and search.reason == "overshoot"  # all is well
    assert f"The cap, {search.cap:.2g}, was found in {search.steps} steps before." in summary
    assert f"of {70 - search.steps} steps" in summary and "momo_adam_auto" not in summary
    explicit = untouched(tmp_path, cls, optim="momo_adam_auto", learning_rate=float(str(KINDS[cls])))
    (line,), summary, optimizer = said(caplog, explicit)
    assert f"learning_rate={KINDS[cls]:g} was given, so it is the upper bound" in line
    assert optimizer.search is None and optimizer.averages and cap_of(optimizer) == KINDS[cls]
    assert "nearly every step" in summary


def test_a_momo_trainer_without_a_choice_takes_the_preset_and_says_which(tmp_path, caplog):
    def trained(**chosen):
        caplog.clear()
        model = Net()
        trainer = MomoTrainer(
            model, TrainingArguments(tmp_path, max_steps=2, use_cpu=True, **chosen), train_dataset=Points()
        )
        with caplog.at_level(logging.WARNING, logger="momo_hf"):
            trainer.train()
        return trainer.optimizer.optimizer, [r.message for r in caplog.records if "were chosen, so" in r.message]

    optimizer, (line,) = trained()
    assert type(optimizer) is MomoMuon and optimizer.search is not None and optimizer.averages
    assert "optim=momo_muon_auto is taken" in line
    for chosen, cls in (
        ({"learning_rate": 1e-3}, torch.optim.AdamW),
        ({"optim": "momo"}, Momo),
        ({"optim": "sgd"}, torch.optim.SGD),
    ):
        optimizer, lines = trained(**chosen)
        assert type(optimizer) is cls and lines == []


def test_what_cannot_be_known_is_said(tmp_path, caplog):
    args = loaded(untouched(tmp_path, optim="momo_adam_auto", max_steps=70), tmp_path)
    (line,), _, optimizer = said(caplog, args)
    assert "nobody knows whether learning_rate=5e-05, the default of TrainingArguments, was chosen" in line
    assert optimizer.search is not None
    (line,), _, optimizer = said(caplog, loaded(untouched(tmp_path), tmp_path))
    assert "left at 5e-05" in line and cap_of(optimizer) == 5e-5


def test_the_cap_of_an_optimizer_by_hand_is_its_own(tmp_path, caplog):
    model = Net()
    optimizer = MomoAdam(model.parameters(), lr=0.5)
    lines, _, _ = said(caplog, untouched(tmp_path, optim="adamw_torch"), model, optimizers=(optimizer, None))
    assert lines == []


def test_a_run_at_its_cap_is_told_what_to_try(tmp_path, caplog):
    lines, summary, _ = said(caplog, arguments(tmp_path, learning_rate=1e-3))
    assert lines == [] and "gives without MoMo" in summary and "try learning_rate=0.01" in summary
    lines, summary, _ = said(caplog, arguments(tmp_path, learning_rate=0.02))
    assert lines == [] and "raise learning_rate above 0.02, or" in summary
    lines, summary, _ = said(caplog, arguments(tmp_path, learning_rate=100.0))
    assert lines == [] and "the cap decided 0%" in summary and "momo_adam_auto" not in summary


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = (torch.arange(8) + index) % 32
        return {"input_ids": ids, "labels": ids}


def test_a_new_model_with_a_learning_rate_for_fine_tuning_is_pointed_out_once(tmp_path, caplog):
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8, **tokens))
    model.save_pretrained(tmp_path / "saved")
    (line,), summary, _ = said(caplog, arguments(tmp_path, learning_rate=float("5e-5")), model, Tokens())
    assert (
        "learning_rate=5e-05, is one for fine-tuning, and this model is new" in line
        and "momo_adam_auto" not in summary
    )
    old = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    lines, summary, _ = said(caplog, arguments(tmp_path, learning_rate=float("5e-5")), old, Tokens())
    assert lines == [] and "nearly every step" in summary
    lines, _, _ = said(caplog, arguments(tmp_path, learning_rate=1e-3), model, Tokens())
    assert lines == []
