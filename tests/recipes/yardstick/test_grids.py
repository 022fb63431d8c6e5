"""Whole grids: every point with all seeds, and the picture of one task against the learning rate."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from momo_hf.recipes.yardstick.grids import plot_grid
from momo_hf.recipes.yardstick.results import collect
from momo_hf.recipes.yardstick.rivals import load_rivals
from momo_hf.recipes.yardstick.running import work


ROWS = """
sgd: {title: SGD, optimizer: torch.optim:SGD, learning_rates: [0.1, 1, 10], schedules: [constant, linear]}
wild: {optimizer: torch.optim:SGD, arguments: {weight_decay: 1000}, learning_rates: [1, 1.0e+38]}
auto: {optimizer: momo_hf:MomoAdam, arguments: {lr: auto, averaging: true}}
"""


@pytest.fixture
def runs_and_axes(plan, tmp_path, monkeypatch):
    path = tmp_path / "rows.yaml"
    path.write_text(ROWS)
    plan = replace(plan, rivals=load_rivals([], path), whole_grids=True)
    work(plan, 0)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    runs = collect(plan)
    plot_grid(plan, runs, plan.tasks[0], tmp_path / "line.png")
    return runs, figures[0]


def test_every_point_is_run_with_all_seeds_and_shown(runs_and_axes):
    runs, figure = runs_and_axes
    counts = runs.groupby(["rival", "learning_rate", "schedule"], dropna=False)["seed"].nunique()
    assert list(counts) == [3] * (3 * 2 + 2 + 1)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for schedule, lr in itertools.product(("constant", "linear"), (0.1, 1, 10)):
        own = runs[(runs["rival"] == "sgd") & (runs["schedule"] == schedule) & (runs["learning_rate"] == lr)]
        drawn = dict(np.asarray(lines[f"SGD, {schedule}"].get_xydata()))
        assert drawn[lr] == pytest.approx(sum(own["loss"]) / 3)
    assert math.isnan(dict(np.asarray(lines["wild"].get_xydata()))[1e38])  # a cross at the edge says it
    searched = runs[runs["rival"] == "auto"]["loss"]
    assert list(lines["auto (searches)"].get_ydata()) == pytest.approx([searched.mean()] * 2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("SGD, constant", "SGD, linear", "wild", "auto (searches)")
    ]
