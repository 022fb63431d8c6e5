"""The picture of a run shows what was logged."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from momo_hf.recipes.curves import plot_training


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a history; gives the panels, as lines by label, and their titles."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (figures.append(self), save(self, *a, **kw)))

    def draw(history):
        path = plot_training(history, tmp_path)
        assert path == tmp_path / "training.png" and Image.open(path).width > 800
        panels = [
            {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
            for axes in figures[-1].axes
        ]
        return panels, [axes.get_title() for axes in figures[-1].axes]

    return draw


def test_losses_step_sizes_the_cap_and_scores(drawn):
    history = [
        {"step": 1, "loss": 4.0, "learning_rate": 0.1, "momo/effective_lr": 0.1, "momo/polyak_lr": 0.5, "momo/capped": 1.0},
        {"step": 3, "eval_loss": 3.0, "eval_bleu": 10.0, "eval_runtime": 2.0, "eval_samples_per_second": 7.0},
        {"step": 5, "loss": "nan", "learning_rate": 0.1, "momo/effective_lr": 0.05, "momo/capped": 0.5},
        {"step": 6, "loss": None, "learning_rate": 0.0, "momo/effective_lr": 0.0, "momo/polyak_lr": float("inf")},
        {"step": 7, "eval_loss": 2.0, "eval_bleu": 30.0, "train_loss": 3.0, "momo/capped_in_all": 0.62},
    ]  # fmt: skip
    (losses, steps, scores), titles = drawn(history)
    assert losses == {"training": ([1], [4.0]), "held out": ([3, 7], [3.0, 2.0])}
    assert steps == {
        "cap (learning rate)": ([1, 5], [0.1, 0.1]),
        "without the cap (polyak_lr)": ([1], [0.5]),
        "step size taken (effective_lr)": ([1, 5], [0.1, 0.05]),
    }
    assert scores == {"bleu": ([3, 7], [10.0, 30.0])}
    assert titles[1] == "Step size (the cap decided 62% of the steps)"


def test_the_search_is_marked(drawn, tmp_path):
    (tmp_path / "search.json").write_text('{"steps": 46}')
    history = [{"step": step, "loss": 9.0 - step / 100, "momo/effective_lr": 0.1} for step in (1, 40, 80, 120)]
    (losses, steps), _ = drawn(history)
    # The loss of step 80 is the mean of the steps from 41 on, and the search had 46.
    assert losses["with losses of the search"][0] == [1, 40, 80] and "with losses of the search" not in steps


def test_another_optimizer_has_no_cap(drawn):
    (losses, steps), titles = drawn([{"step": step, "loss": 1.0, "learning_rate": 0.1} for step in (1, 2)])
    assert losses == {"training": ([1, 2], [1.0, 1.0])} and steps == {"learning rate": ([1, 2], [0.1, 0.1])}
    assert titles[1] == "Learning rate"


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": float("nan")}], [{"step": 2, "train_loss": 1.0}]])
def test_nothing_logged_nothing_drawn(history, tmp_path):
    assert plot_training(history, tmp_path) is None and not list(tmp_path.iterdir())
