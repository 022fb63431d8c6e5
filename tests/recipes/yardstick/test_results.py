"""Which runs are wanted, what is best, the tables and the figure: from real runs of a task that takes no time."""

import csv
import itertools
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from momo_hf.recipes.sweeps.queue import key
from momo_hf.recipes.yardstick.figures import plot
from momo_hf.recipes.yardstick.plan import finalists
from momo_hf.recipes.yardstick.results import best, by_accuracy_where_there_is, by_loss, collect, ratios
from momo_hf.recipes.yardstick.running import work
from momo_hf.recipes.yardstick.tables import tables


def independent_best(path, measure, sign, seeds):
    """By the csv alone: of every rival's points with all seeds, the one whose mean is best."""
    values = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            point = (row["rival"], row["learning_rate"], row["schedule"])
            values[point][int(row["seed"])] = float(row[measure]) if row["outcome"] == "ok" else sign * math.inf
    means = {
        point: sum(by_seed.values()) / len(seeds) for point, by_seed in values.items() if set(by_seed) == set(seeds)
    }
    rivals = {rival for rival, *_ in values}
    return {rival: min((sign * m, lr, s) for (r, lr, s), m in means.items() if r == rival) for rival in rivals}


def test_the_best_of_real_runs(plan, tmp_path):
    work(plan, 0)
    runs = collect(plan)
    assert set(runs["outcome"]) == {"ok", "diverged"} and set(runs[runs["outcome"] == "diverged"]["rival"]) == {"wild"}
    assert runs[runs["rival"] == "auto"]["cap"].isna().all()  # five steps do not find one
    # Every point of the grid once, and the two best by loss and by accuracy three times.
    grid = runs[runs["rival"] == "adamw"]
    counts = grid.groupby(["learning_rate", "schedule"]).size()
    assert len(counts) == 6 and set(counts) == {1, 3} and 2 <= (counts == 3).sum() <= 4 + 1  # and the row adamw_1
    firsts = grid[grid["seed"] == 0].set_index(["learning_rate", "schedule"])
    for measure, ascending in (("loss", True), ("accuracy", False)):
        top = firsts[measure].sort_values(ascending=ascending, kind="stable").index[:2]
        assert (counts[top] == 3).all(), measure
    runs.to_csv(tmp_path / "runs.csv", index=False)
    names = [rival.name for rival in plan.rivals]
    found = {}
    for measure, sign in (("loss", 1), ("accuracy", -1)):
        found[measure] = independent_best(tmp_path / "runs.csv", measure, sign, plan.seeds)
        ours = best(plan, runs, measure).loc["line"]
        for rival in names:
            value, lr, schedule = found[measure][rival]
            assert sign * ours.loc[rival, "value"] == pytest.approx(value) or math.isinf(value), (measure, rival)
            if rival == "adamw" and measure == "loss":
                assert (ours.loc[rival, "learning_rate"], ours.loc[rival, "schedule"]) == (float(lr), schedule)
    first = found["loss"]["adamw"][0]
    shown = by_loss(plan, runs).loc["line"]
    for rival in names[1:]:
        assert shown[rival] == pytest.approx(found["loss"][rival][0] / first)
    assert math.isinf(shown["wild"])
    accuracy = ratios(plan, runs, "accuracy").loc["line"]
    assert accuracy["sgd"] == pytest.approx(found["accuracy"]["adamw"][0] / found["accuracy"]["sgd"][0])
    pd.testing.assert_series_equal(by_accuracy_where_there_is(plan, runs).loc["line"], accuracy)
    written = tables(plan, runs)
    assert f"{shown['sgd']:.3f}" in written and "diverged" in written and "not ready" not in written

    # Nothing is left to do; other steps, and another learning rate, are other runs.
    before = len(plan.studies()["line"].trials)
    work(plan, 1)
    assert len(plan.studies()["line"].trials) == before == plan.progress(plan.studies())[1]
    assert plan.progress(plan.studies())[0] == before
    other = replace(plan, steps=3)
    assert collect(other).empty and other.progress(plan.studies())[0] == 0


def test_a_grid_waits_for_all_its_points_before_finalists_are_known(plan):
    (task,), adamw = plan.tasks, plan.rivals[0]
    plan = replace(plan, rivals=[adamw])
    grid = [(setting, plan.point(task, setting, 0)) for setting in adamw.settings]

    class Trial:
        def __init__(self, **measures):
            self.user_attrs = {"measures": measures}

    losses = [0.9, math.nan, 0.3, 0.5, 0.4, 0.8]
    accuracies = [0.2, math.nan, 0.1, 0.9, 0.1, 0.1]
    done = {key(point): Trial(loss=a, accuracy=b) for (_, point), a, b in zip(grid, losses, accuracies)}
    partly = dict(itertools.islice(done.items(), 5))
    assert finalists(grid, partly) == [] and len(plan.wanted(task, partly)) == 6
    assert finalists(grid, done) == [grid[0], grid[2], grid[3], grid[4]]
    assert len(plan.wanted(task, done)) == 6 + 4 * 2
    losses_alone = {key(point): Trial(loss=a) for (_, point), a in zip(grid, losses)}
    assert finalists(grid, losses_alone) == [grid[2], grid[4]]
    crashed = {key(point): Trial() for _, point in grid}
    assert finalists(grid, crashed) == [] and len(plan.wanted(task, crashed)) == 6


def made_up(plan, values):
    """Runs of every rival for several tasks; `values`: mean losses, task by rival."""
    rows = [
        {"task": task.name, "rival": rival.name, "learning_rate": math.nan, "schedule": "constant", "seed": seed}
        | {"loss": value + 0.01 * (seed - 1), "accuracy": math.nan, "cap": math.nan, "outcome": "ok"}
        for task, row in zip(plan.tasks, values)
        for rival, value in zip(plan.rivals, row)
        for seed in plan.seeds
    ]
    return pd.DataFrame(rows)


def test_the_summary_counts_as_it_says(plan):
    plan = replace(plan, tasks=[replace(plan.tasks[0], name=name, title=name.upper()) for name in "abc"])
    runs = made_up(plan, [(1.0, 1.019, 1.3, 1.0, 0.5), (2.0, 2.0, 2.2, 4.0, 1.5), (4.0, 4.2, 4.0, 4.0, 4.0)])
    text = tables(plan, runs)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line
    }
    means = [(1.019 + 1 + 1.05) / 3, (1.3 + 1.1 + 1) / 3, (1 + 2 + 1) / 3, (0.5 + 0.75 + 1) / 3]
    assert rows["mean of 3, by loss"] == [f"{mean:.2f}" for mean in means]
    assert rows["worst"] == ["1.05", "1.30", "2.00", "1.00"] and rows["within 2%, of 3"] == ["2", "1", "2", "3"]
    assert rows["B"] == ["2, default, constant", "1.000", "1.100", "2.000", "0.750"]
    unready = tables(plan, runs[(runs["rival"] != "sgd") | (runs["seed"] > 0)])
    assert unready.count("not ready") == 2 + 3  # mean and worst, and every task
    runs.loc[runs["task"].eq("a") & runs["rival"].isin(["adamw", "sgd"]), "loss"] = math.nan
    assert by_loss(plan, runs).loc["a"].isna().all()  # what nothing can be measured by
    runs.loc[runs["task"].eq("b") & runs["rival"].eq("wild") & runs["seed"].eq(1), "loss"] = math.nan
    assert math.isinf(by_loss(plan, runs).loc["b", "wild"])  # one of three diverged


@pytest.mark.parametrize("far", [1.1, 30.0, math.nan])
def test_the_figure_shows_all_dots_and_hides_no_words(plan, tmp_path, monkeypatch, far):
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (saved.append(self), save(self, *a, **kw)))
    names = [f"{name} {i}" for name in ("clicks, DLRM, batches of 128", "digits", "GPT-2, captions") for i in range(4)]
    plan = replace(plan, tasks=[replace(plan.tasks[0], name=name, title=name) for name in names])
    plot(plan, made_up(plan, [(1, 1.02, 1.3, far, 0.5), *[(2, 2, 2.2, 4, 1.5)] * 11]), tmp_path / "figure.png")
    (figure,) = saved
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert len(dots) == len(plan.rivals) - 1 == len(figure.legends[0].get_texts())
    shown = axes.transData.transform(np.concatenate([line.get_xydata() for line in dots]))
    assert len(shown) == 48 and all(axes.bbox.padded(1).contains(*point) for point in shown)
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert not legend.overlaps(axes.get_tightbbox()) and legend.x0 >= 0 and legend.x1 <= whole.x1
    assert axes.get_tightbbox().x0 >= 0
