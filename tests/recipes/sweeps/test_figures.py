"""Nothing in a figure lies over anything else, and nothing is cut off."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from momo_hf.recipes.sweeps.comparison import plot_comparison
from momo_hf.recipes.sweeps.config import load_sweep
from momo_hf.recipes.sweeps.figures import plot_sweep


ROOT = Path(__file__).parents[3]
NAMES = ["adamw", "adamw_linear", "schedule_free_adamw", "momo_adam", "momo_adam_auto_linear"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (saved.append(self), save(self, *a, **kw)))
    return saved


def assert_apart(boxes):
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)


@pytest.mark.parametrize("ends", [(-19.7, 94.0), (0.3, 1.0), (-60.0, 700.0)])
def test_a_comparison_shows_all_its_points_and_labels(figures, tmp_path, ends):
    values = itertools.cycle([*ends, 0.0, 5.0, -3.0])
    rows = [
        {"task": task, "optimizer": name, "% worse than best AdamW": next(values), "% worse": next(values)}
        for task in ("demo", "translation_demo", "diffusion_demo", "criteo_demo")
        for name in NAMES
    ]
    plot_comparison(pd.DataFrame(rows), tmp_path / "compare.png")
    (figure,) = figures
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    shown = axes.transData.transform(np.concatenate([line.get_xydata() for line in lines]))
    assert len(shown) >= 2 * len(rows) and all(axes.bbox.contains(*point) for point in shown)
    for axis in (axes.xaxis, axes.yaxis):
        assert_apart([label.get_window_extent() for label in axis.get_ticklabels()])
    assert_apart([axes.get_tightbbox(), figure.legends[0].get_window_extent()])


def test_a_sweep_of_which_nothing_is_left_is_drawn(figures, tmp_path):
    """All that has ended diverged, and the optimizer that searches has not run yet."""
    sweep = load_sweep(ROOT / "configs/sweeps/demo.yaml", output_dir=str(tmp_path))
    row = {"optimizer": "adamw", "learning_rate": 10.0, "seed": 0, sweep.metric: math.nan, "history": []}
    plot_sweep(sweep, pd.DataFrame([row]))
    final = figures[0].axes[0]
    (cross,) = [line for line in final.lines if line.get_marker() == "x"]
    assert cross.get_xydata().tolist() == [[10.0, 0.0]]  # at the edge of the worse values
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(sweep.optimizers)


def test_a_sweep_has_its_legend_under_the_curves(figures, tmp_path):
    sweep = load_sweep(ROOT / "configs/sweeps/demo.yaml", output_dir=str(tmp_path))
    history = [{"step": step, "loss": 1 / step, "momo/effective_lr": 0.1 / step} for step in range(1, 100)]
    rows = [
        {"optimizer": name, "learning_rate": lr, "seed": seed, sweep.metric: 1 / (1 + lr), "history": history}
        for name, grid in sweep.grids.items()
        for lr in grid
        for seed in sweep.seeds
    ]
    plot_sweep(sweep, pd.DataFrame(rows))
    figure = figures[0]
    figure.draw_without_rendering()  # as the PNG was laid out, and not the SVG after it
    assert all(axes.get_legend() is None for axes in figure.axes)
    (legend,) = figure.legends
    texts = [text.get_text().split(",")[0].removesuffix(" (searches)") for text in legend.get_texts()]
    assert texts == list(sweep.optimizers)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert_apart([*boxes, legend.get_window_extent()])
    # A few lines, each with its name beside its end, and none over another.
    for axes in figure.axes[1:]:
        names = [text.get_text() for text in axes.texts]
        assert sorted(names) == sorted(line.get_label() for line in axes.lines) and 1 < len(names) <= 5
        assert_apart([axes.get_window_extent(), *(text.get_window_extent() for text in axes.texts)])
        assert all(axes.bbox.y0 < text.get_window_extent().y0 for text in axes.texts)
        assert all(text.get_window_extent().y1 < axes.bbox.y1 + 10 for text in axes.texts)
    # The panels take the whole width.
    assert boxes[0].x0 < 0.02 * figure.bbox.width and boxes[-1].x1 > 0.98 * figure.bbox.width
