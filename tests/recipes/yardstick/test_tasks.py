"""Every task trains, does so alike from the same seed, and measures what it says; own ones are found by their path."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.translation import data as translation_data
from momo_hf.recipes.yardstick import running, tasks
from momo_hf.recipes.yardstick.data import Places
from momo_hf.recipes.yardstick.loop import batches
from momo_hf.recipes.yardstick.parts import measures, translation
from momo_hf.recipes.yardstick.parts.images import pictures
from momo_hf.recipes.yardstick.rivals import Rival
from momo_hf.recipes.yardstick.running import train
from momo_hf.recipes.yardstick.task import load_task
from momo_hf.recipes.yardstick.tasks import TASKS


LONG = ("text_to_image",)
ADAMW = Rival("adamw", "torch.optim:AdamW", learning_rates=[1e-3])


@pytest.fixture(autouse=True)
def short_preparations(monkeypatch):
    monkeypatch.setattr(translation_data, "DEMO_SIZES", {"train": 60, "validation": 10, "test": 10})
    monkeypatch.setattr(translation, "PRETRAINING_STEPS", 2)
    for name, constant in (("lora_vit", "PRETRAINING_STEPS"), ("text_to_image", "PIPELINE_STEPS")):
        monkeypatch.setattr(importlib.import_module(f"momo_hf.recipes.yardstick.tasks.{name}"), constant, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


def test_there_is_a_file_for_every_task():
    files = {path.stem for path in Path(tasks.__path__[0]).glob("*.py")}
    assert files - {"__init__"} == set(TASKS) and len(TASKS) == len(set(TASKS))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in TASKS]
)
def test_a_task_trains_alike_from_the_same_seed(name, data_folder, prepared, encoder_package):
    task, places = load_task(name), Places(data_folder, prepared)
    assert task.missing(places) is None and task.title != name
    data = task.read(places)
    (setting,) = ADAMW.settings
    first, again = (train(task, data, setting | {"steps": 1, "seed": 0})["measures"] for _ in range(2))
    assert first == again
    assert math.isfinite(first["loss"]) and 0 <= first.get("accuracy", 0) <= 1
    assert "accuracy" in first or not task.by_accuracy

    torch.manual_seed(0)
    model = task.model(data)
    before = [p.detach().clone() for p in model.parameters()]
    loss = task.loss(model, next(batches(data, task.batch_size, 1, seed=0)))
    assert loss.shape == () and loss.requires_grad
    model.eval()
    with torch.no_grad():
        task.held_out(model, data)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))  # to measure changes nothing


def measured(name, places):
    task = load_task(name)
    data = task.read(places)
    torch.manual_seed(0)
    model = task.model(data).eval()
    with torch.no_grad():
        return task.held_out(model, data), model, data


@pytest.mark.parametrize("name, unpredicted", [("translation_demo", 0), ("gpt2_captions", 1)])
def test_a_loss_of_tokens_is_the_mean_over_all_tokens(name, unpredicted, data_folder, prepared, monkeypatch):
    monkeypatch.setattr(measures, "HELD_OUT_BATCH", 2)
    held_out, model, data = measured(name, Places(data_folder, prepared))
    losses = []
    for row in data.held_out:  # one by one, so that nothing is padded
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]]) if "labels" in row else ids
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels).logits[0]
        if unpredicted:
            logits = logits[:-1]
        losses += torch.nn.functional.cross_entropy(logits, labels[0, unpredicted:], reduction="none").tolist()
    assert held_out["loss"] == pytest.approx(np.mean(losses), rel=2e-6)


def test_classifiers_are_measured_as_scikit_learn_measures(data_folder, prepared, encoder_package):
    for name in ("digits", "bert_captions"):
        held_out, model, data = measured(name, Places(data_folder, prepared))
        with torch.no_grad():
            if name == "digits":
                pixels, labels = data.held_out.tensors
                shares = model(pixels).logits.double().softmax(-1)
            else:
                labels = torch.tensor([row["labels"] for row in data.held_out])
                rows = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in data.held_out]
                shares = torch.stack(rows).double().softmax(-1)
        assert held_out["loss"] == pytest.approx(log_loss(labels, shares), rel=1e-5)
        assert held_out["accuracy"] == pytest.approx((shares.argmax(-1) == labels).double().mean().item())


def test_clicks_are_measured_over_all_rows(prepared):
    held_out, model, data = measured("clicks", Places(None, prepared))
    dense, sparse, labels = data.held_out.tensors
    with torch.no_grad():
        shares = model(dense, sparse).logits.double().sigmoid()
    assert len(labels) == 10_000
    assert held_out["loss"] == pytest.approx(log_loss(labels, shares), rel=1e-5)


def test_captions_are_told_apart_without_the_word(data_folder, prepared, encoder_package):
    minilm = importlib.import_module("momo_hf.recipes.yardstick.tasks.minilm")
    assert minilm.without_the_word("Two Dogs chase a puppy.") == ("two one chase a one.", 0)
    assert minilm.without_the_word("A boy and his dog") is None and minilm.without_the_word("A boyish man") is None
    assert minilm.without_the_word("Children and a girl") == ("one and a one", 1)
    data = load_task("bert_captions").read(Places(data_folder, prepared))
    kinds = [row["labels"] for row in data.train]
    assert len(kinds) > 10 and 2 * sum(kinds) == len(kinds)


def test_missing_data_and_packages_are_named(tmp_path):
    (tmp_path / "mnist").mkdir()
    for places, missing in (
        (Places(None, tmp_path), {"mnist", "vit", "iwslt14"}),
        (Places(tmp_path, tmp_path), {"vit", "iwslt14"}),
    ):
        for name in ("digits", "mnist", "vit", "iwslt14"):
            reason = load_task(name).missing(places)
            assert (reason is not None) == (name in missing), (name, reason)
    assert "'iwslt14' in the folder that --data names" in load_task("iwslt14").missing(Places(None, tmp_path))


def test_a_missing_package_is_named(own_task, tmp_path):
    own_task.write_text(own_task.read_text() + 'PACKAGES = ("torch", "no_such_package")\n')
    assert load_task(str(own_task)).missing(Places(None, tmp_path)) == "the package no-such-package is not installed"
    own_task.write_text(own_task.read_text().replace(', "no_such_package"', ","))
    assert load_task(str(own_task)).missing(Places(None, tmp_path)) is None


def test_an_own_task_is_found_by_its_path(own_task, tmp_path, monkeypatch):
    task = load_task(str(own_task))
    assert (task.name, task.title, task.steps, task.batch_size) == ("line", "line", 5, 4)
    (setting,) = ADAMW.settings
    data = task.read(Places(None, tmp_path))
    short, other, long = (
        train(task, data, setting | {"steps": steps, "seed": seed})["measures"]["loss"]
        for steps, seed in ((1, 0), (1, 1), (400, 0))
    )
    assert other != short and long < 0.8 * short
    monkeypatch.setattr(running, "set_seed", lambda seed: torch.manual_seed(0))
    alike, other = (train(task, data, setting | {"steps": 1, "seed": seed})["measures"]["loss"] for seed in (0, 1))
    assert alike == short != other  # the same weights, and batches of another order


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("def held_out", "def measure", "line.py: a task has the functions .* but 'held_out' is missing"),
        ("STEPS, BATCH_SIZE = 5, 4", "STEPS = 5", r"`BATCH_SIZE` must be a whole number from 1.* got None"),
        ("STEPS, BATCH_SIZE = 5, 4", "STEPS, BATCH_SIZE = 0, 4", r"`STEPS` must be a whole number from 1.* got 0"),
    ],
)
def test_what_a_task_lacks_is_named(own_task, old, new, message):
    own_task.write_text(own_task.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        load_task(str(own_task))


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match="'digit'; did you mean 'digits'"):
        load_task("digit")
    with pytest.raises(InputError, match="the task nothing.py does not exist"):
        load_task("nothing.py")


def test_what_is_prepared_is_made_once_and_whole(tmp_path):
    places, made = Places(None, tmp_path / "prepared"), []

    def make(folder):
        (folder / f"part-{len(made)}").touch()
        made.append(folder)
        if len(made) == 1:
            raise RuntimeError("interrupted")
        (folder / "end").touch()

    with pytest.raises(RuntimeError):
        places.made("model", make)
    folders = {places.made("model", make) for _ in range(2)}
    assert len(made) == 2 and folders == {tmp_path / "prepared" / "model"}
    assert {path.name for path in folders.pop().iterdir()} == {"part-1", "end"}
    assert places.made("other", make).is_dir() and len(made) == 3


def test_some_classes_of_pictures_are_counted_from_0(data_folder):
    whole, some = (pictures(str(data_folder / "cifar10"), 32, 3, classes) for classes in (None, range(5, 10)))
    pixels, labels = whole.train.tensors
    assert len(labels) == 80 and set(labels.tolist()) == set(range(10)) and pixels.min() < -0.9 and pixels.max() > 0.9
    assert torch.equal(some.train.tensors[0], pixels[labels >= 5])
    assert torch.equal(some.train.tensors[1], labels[labels >= 5] - 5)
