"""Rows of rivals: read, refused with the line to mend, made to optimizers, and known by their code."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from momo_hf import MomoAdam
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.yardstick import source
from momo_hf.recipes.yardstick.muon import MuonAndAdamW
from momo_hf.recipes.yardstick.rivals import Rival, load_rivals, make_optimizer


TABLE = Path(__file__).parents[3] / "configs" / "yardstick.yaml"
LONG = "yardstick_long.yaml"


def test_the_table_of_the_repository():
    rivals = {rival.name: rival for rival in load_rivals([], TABLE)}
    assert next(iter(rivals)) == "adamw" and rivals["adamw"].label == "best AdamW"
    assert rivals["momo_adam_auto"].label == "momo_adam_auto"
    assert [rival.name for rival in load_rivals(["prodigy", "adamw"], TABLE)] == ["prodigy", "adamw"]
    assert "prodigyopt" in (rivals["prodigy"].missing() or "prodigyopt")
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 20), nn.Linear(20, 2))
    made = {name: make_optimizer(r.settings[-1], model) for name, r in rivals.items() if r.missing() is None}
    assert isinstance(made["muon"], MuonAndAdamW) and isinstance(made["momo_adam_auto"], MomoAdam)
    assert made["momo_adam_auto"].searching and made["momo_adam_auto"].averages
    group = made["adamw_3e-3_decayed"].param_groups[0]
    assert group["lr"] == 3e-3 and group["weight_decay"] == 0
    default = inspect.signature(type(made["schedule_free_adamw"])).parameters["lr"].default
    assert made["schedule_free_adamw"].param_groups[0]["lr"] == default
    grid = {(setting["learning_rate"], setting["schedule"]) for setting in rivals["adamw"].settings}
    assert grid == {(lr, s) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2) for s in ("constant", "linear")}
    # A point that two rows share is one run.
    assert rivals["adamw_1e-3"].settings[0] in rivals["adamw"].settings


def test_the_rows_of_the_robustness_figure_can_be_made():
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 20), nn.Linear(20, 2))
    rivals = load_rivals([], TABLE.with_name("robustness.yaml"))
    decades = {setting["learning_rate"] for rival in rivals for setting in rival.settings} - {None}
    assert max(decades) / min(decades) == pytest.approx(1e5)  # five
    made = {r.name: make_optimizer(r.settings[0], model).param_groups for r in rivals if r.missing() is None}
    assert all(group["use_fstar"] for group in made["momo_muon_fstar"])
    assert not any(group["use_fstar"] for group in made["momo_muon"])


def test_the_rows_of_the_long_runs_are_the_presets_and_adamw_by_cosine():
    rows, table = ({r.name: r for r in load_rivals([], TABLE.with_name(name))} for name in (LONG, TABLE.name))
    assert {setting["schedule"] for setting in rows["adamw"].settings} == {"cosine"}
    for name in ("momo_adam_auto", "momo_muon_auto"):
        assert rows[name].settings == table[name].settings


def test_frozen_parameters_are_left_alone():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (setting,) = Rival("sgd", "torch.optim:SGD", {"momentum": 0.5}, learning_rates=[0.1]).settings
    (group,) = make_optimizer(setting, model).param_groups
    assert group["params"] == [model.bias] and group["momentum"] == 0.5


def test_rows_of_a_file_join_those_by_name(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("mine: {optimizer: torch.optim:SGD, learning_rates: [1, 2]}\n")
    assert [rival.name for rival in load_rivals(["adamw", str(own)], TABLE)] == ["adamw", "mine"]
    with pytest.raises(InputError, match="'adam'; did you mean 'adamw'"):
        load_rivals(["adam"], TABLE)


@pytest.mark.parametrize(
    "row, message",
    [
        ("torch.optim:SGD", "line 1: 'mine' must be a row such as"),
        ("{title: mine}", "line 1: 'mine' must be a row such as"),
        ("{optimizer: torch.optim.SGD}", "`optimizer` must be of the form `module:name`, got 'torch.optim.SGD'"),
        ("{optimizer: torch.optim:SGD, lr: 1}", "line 1: unknown name 'lr'"),
        (
            "{optimizer: torch.optim:SGD, learning_rates: 1}",
            "`learning_rates` must be a list of positive numbers, got 1",
        ),
        ("{optimizer: torch.optim:SGD, learning_rates: [-1]}", r"positive numbers, got \[-1\]"),
        ("{optimizer: torch.optim:SGD, schedules: [step]}", r"some of constant, linear, cosine, got \['step'\]"),
        ("{optimizer: torch.optim:SGD, arguments: {lr: 1}, learning_rates: [1]}", "not both"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    own = tmp_path / "own.yaml"
    own.write_text(f"mine: {row}\n")
    with pytest.raises(InputError, match=message):
        load_rivals([str(own)], TABLE)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "newer_torch_only.py").write_text("from torch.optim import AdamW, NotYet\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "'NotYet' from 'torch.optim'" in Rival("a", "newer_torch_only:Mine").missing()
    assert Rival("a", "no_such_package:Adam").missing() == "the package no_such_package is not installed"
    assert Rival("a", "torch.optim:Adamm").missing() == "torch.optim has no Adamm"
    assert torch.__version__ in Rival("a", "torch:Adamm").missing()
    assert Rival("a", "torch.optim:SGD", groups="momo_hf.optim:nothing").missing() == "momo_hf.optim has no nothing"


def test_a_row_is_another_where_its_code_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "own_optimizer.py"
    path.write_text("from torch.optim import SGD\n\nclass Mine(SGD):\n    x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (before,) = Rival("mine", "own_optimizer:Mine").settings
    (same,) = Rival("other", "own_optimizer:Mine", title="Other").settings
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    source._tree.cache_clear(), source._code.cache_clear()
    (after,) = Rival("mine", "own_optimizer:Mine").settings
    assert before == same != after
    (ours,) = Rival("mine", "momo_hf:MomoAdam").settings
    assert ours["code"] != Rival("mine", "momo_hf:Momo").settings[0]["code"]
