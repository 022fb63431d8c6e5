"""What a Trainer shows of a search for the cap: its logs, its files, its words."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import Trainer

from momo_hf import MomoAdam
from momo_hf.integrations.search_report import SearchReport, draw_search
from momo_hf.optim.steps.search import Search
from tests.integrations.test_transformers import arguments
from tests.toys import Net, Points


def train(folder, steps=70, **options):
    args = arguments(folder, optim="momo_adam_auto", optim_args="lr=auto", max_steps=steps, **options)
    trainer = Trainer(Net(), args, train_dataset=Points())
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer, trainer.optimizer.search


def test_a_trainer_logs_the_ramp_and_then_the_cap_whatever_the_schedule_takes_off(tmp_path):
    trainer, search = train(tmp_path, steps=100, lr_scheduler_type="linear")
    logs = trainer.state.log_history[:100]
    for name in ("momo/cap", "learning_rate", "momo/effective_lr"):
        assert [entry[name] for entry in logs[: search.steps - 1]] == pytest.approx(search.step_sizes[:-1])
    expected = search.cap * np.minimum(np.arange(1, 101 - search.steps) / search.steps, 1)
    for name in ("momo/cap", "learning_rate"):
        assert [entry[name] for entry in logs[search.steps :]] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert all(0 <= entry["momo/effective_lr"] <= search.cap * 1.0001 for entry in logs[search.steps :])


def test_a_trainer_goes_on_bit_for_bit_from_any_phase(tmp_path):
    """The checkpoints hold the averaged weights, or during the search those of the ramp, beside a state of the same mode."""
    saving = {"save_strategy": "steps", "save_steps": 21}  # an epoch has three
    whole, search = train(tmp_path / "whole", steps=75, **saving)
    assert 21 < search.steps < 63
    for step in (21, 63):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, found = train(tmp_path / f"{step}", steps=75, resume_from_checkpoint=checkpoint, **saving)
        assert found == search
        assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_the_files_hold_what_was_seen(tmp_path):
    _, search = train(tmp_path)
    assert json.loads((tmp_path / "search.json").read_text()) == search._asdict()
    with Image.open(tmp_path / "search.png") as image:
        assert image.size == (825, 715) and len(set(image.convert("RGB").getdata())) > 100


def test_a_line_stands_above_the_bar(tmp_path, capsys):
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("momo_hf")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(tmp_path, disable_tqdm=False)
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert any("/70 [" in line for line in lines)  # there was a bar
    # A carriage return ends a line too: what is cleared away with spaces is followed by one.
    for start in ("search: cap", "MomoAdam used step sizes"):
        assert sum(line.startswith(start) for line in lines) == 1, lines


def stepper():
    """An optimizer that searches, and a function that takes a step."""
    model, data = Net(), Points()
    optimizer = MomoAdam(model.parameters(), lr="auto")

    def step():
        loss = model(data.inputs, data.labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)

    return optimizer, step


SIZES = [1e-6 * 10**k for k in range(5)]


def drawn(search):
    """The vertical lines of the lower panel by what the legend calls them, and all texts, of the picture of a search."""
    figure = Figure()
    draw_search(search, figure)
    above, below = figure.axes
    names = [text.get_text() for text in above.get_legend().get_texts()]
    upright = [line.get_xdata()[0] for line in below.lines[1:]]
    return dict(zip(names, upright)), " ".join(f"{below.get_title(loc='left')} {figure.get_supxlabel()}".split())


def test_the_picture_shows_what_ended_the_search_and_what_the_cap_is_made_of():
    # S is largest after the step of 1e-4, and the last step has 1e-2: 0.3 times the root of their product.
    search = Search(3e-4, 5, "overshoot", SIZES, [3.0, 2.0, 1.0, 2.0, 9.0], [0.0, 0.8, 1.6, 2.4, 0.3])
    lines, words = drawn(search)
    assert lines == {
        "α_S = 0.0001": pytest.approx(1e-4),
        "α_end = 0.01": pytest.approx(1e-2),
        "cap = 0.0003 = 0.3 √(α_S α_end)": pytest.approx(3e-4),
    }
    assert "S has fallen by 2.1 from its top" in words and "(α_S)" in words and "beyond the minimum" in words
    # Without a signal α_S is a tenth of the last size.
    search = search._replace(cap=0.3 * 0.1**0.5 * 1e-2, reason="harm")
    lines, words = drawn(search)
    assert list(lines) == ["α_end = 0.01", "cap = 0.00095 = 0.3 √0.1 α_end"] and "gradients have grown" in words
    lines, words = drawn(search._replace(cap=5e-5, reason="nothing found"))
    assert lines == {"cap = 5e-05, a cautious one": 5e-5} and "its last step" in words


def test_the_picture_of_a_real_search_finds_where_its_cap_comes_from(tmp_path):
    _, search = train(tmp_path)
    lines, _ = drawn(search)
    assert search.reason == "overshoot" and len(lines) == 3


def test_a_run_that_ends_in_the_middle_of_the_search_says_so_and_shows_what_there_is(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, steps=20)
    begun, ended = [r.message for r in caplog.records if r.name.endswith("search_report")]
    assert begun.startswith("This training has 20 steps, and the search for the cap takes 13 to 60 in all")
    assert ended.startswith("Training ended after 20 steps of the search")
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["cap"] is None and found["steps"] == len(found["losses"]) == 20 and (tmp_path / "search.png").exists()


@pytest.mark.parametrize("steps, said", [(39, True), (40, False)])
def test_a_run_that_may_be_shorter_than_its_search_is_told_at_the_start(tmp_path, caplog, steps, said):
    """One that goes on after 21 of at most 60 steps of it; of the main process."""
    optimizer, step = stepper()
    for _ in range(21):
        step()
    for writes in (False, True):
        SearchReport(optimizer, tmp_path, writes, steps)
    lines = [r.message for r in caplog.records if "Train longer, or give a learning rate" in r.message]
    assert len(lines) == said and all(line.startswith(f"This training has {steps} steps") for line in lines)


def test_without_a_usable_step_training_ends_in_words(tmp_path, caplog):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    args = arguments(tmp_path, optim="momo_adam_auto", optim_args="lr=auto", max_steps=64)
    model = Net()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    trainer = Broken(model, args, train_dataset=Points())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum(r.message.startswith("Nothing could be found: no step") for r in caplog.records) == 1
    assert trainer.state.log_history[63]["momo/skipped"] == 64 and not list(tmp_path.glob("search.*"))
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)


def test_a_run_that_goes_on_after_the_search_leaves_the_files(tmp_path):
    _, search = train(tmp_path, save_strategy="steps", save_steps=65)
    (tmp_path / "search.json").unlink()
    _, resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-65"))
    assert resumed == search and not (tmp_path / "search.json").exists()


def report(folder, writes=True):
    """A report whose search is over."""
    optimizer, step = stepper()
    made = SearchReport(optimizer, folder, writes, 62)
    for _ in range(62):
        step()
        made.after_step()
    assert optimizer.search.cap is not None
    return made


def test_one_process_writes(tmp_path):
    report(tmp_path / "other", writes=False)
    assert not (tmp_path / "other").exists()
    report(tmp_path / "main")
    assert sorted(path.name for path in (tmp_path / "main").iterdir()) == ["search.json", "search.png"]


def test_without_matplotlib_the_numbers_are_there_and_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    assert sum("pip install matplotlib" in r.message for r in caplog.records) == 1


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    report(tmp_path / "file")
    assert sum("could not be written" in r.message for r in caplog.records) == 1


def test_a_given_learning_rate_leaves_no_files(tmp_path):
    args = arguments(tmp_path, optim="momo_adam_auto")
    Trainer(Net(), args, train_dataset=Points()).train()
    assert list(tmp_path.glob("search.*")) == []
