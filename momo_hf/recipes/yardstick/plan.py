"""Which runs there are to be: every point of every grid once, and what may be a rival's best with all seeds."""

import math
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial

from momo_hf.recipes.sweeps.queue import Point, Queue, SharedStudy, finished, key
from momo_hf.recipes.yardstick.data import Places
from momo_hf.recipes.yardstick.rivals import Rival
from momo_hf.recipes.yardstick.task import Task


# Points of a grid that are run with all seeds: so many by each measure, after one run of every point.
FINALISTS = 2
MEASURES = {"loss": 1, "accuracy": -1}  # and the sign that makes less better


@dataclass(frozen=True)
class Plan:
    """Tasks, rivals and seeds.

    Args:
        tasks: whose data are there, each under a name of its own.
        rivals: whose packages are there; all others are measured by the best point of the first.
        seeds: the first is that of the grids.
        steps: of every run; None: as each task says.
        places: for the tasks.
        output_dir: of storage and results.
        storage: optuna's; default: sqlite in the output folder.
        whole_grids: run every point of a grid with all seeds.
    """

    tasks: list[Task]
    rivals: list[Rival]
    seeds: list[int]
    steps: int | None
    places: Places
    output_dir: Path
    storage: str | None = None
    whole_grids: bool = False

    def studies(self) -> dict[str, SharedStudy]:
        """The study of every task, by its name."""
        queue = Queue(self.output_dir, self.storage, "yardstick")
        return {task.name: queue.study(task.name) for task in self.tasks}

    def point(self, task: Task, setting: Point, seed: int) -> Point:
        """All that makes a run: where any of it changes, it is another run."""
        return setting | {"task": task.code, "steps": self.steps or task.steps, "seed": seed}

    def wanted(self, task: Task, done: dict[str, FrozenTrial]) -> list[Point]:
        """The runs of a task, as far as they are known.

        Args:
            task: of the runs.
            done: finished trials by the keys of their points; when all points of a grid are, its finalists are wanted.
        """
        points = {}
        for rival in self.rivals:
            grid = [(setting, self.point(task, setting, self.seeds[0])) for setting in rival.settings]
            for setting, point in grid if self.whole_grids else finalists(grid, done):
                for one in (point, *(self.point(task, setting, seed) for seed in self.seeds)):
                    points[key(one)] = one
            points |= {key(point): point for _, point in grid}
        return list(points.values())

    def progress(self, studies: dict[str, SharedStudy]) -> tuple[int, int]:
        """How many of the wanted runs are done, and how many are wanted so far."""
        number_done = number = 0
        for task in self.tasks:
            done = finished(studies[task.name])
            wanted = self.wanted(task, done)
            number_done += sum(key(point) in done for point in wanted)
            number += len(wanted)
        return number_done, number


def finalists(grid: list[tuple[Point, Point]], done: dict[str, FrozenTrial]) -> list[tuple[Point, Point]]:
    """Of pairs of a setting and its first run, those that are among the best by one of the measures.

    A grid that is small enough is taken as it is, and of one that has not been run to its end none.
    """
    if len(grid) <= FINALISTS:
        return grid
    if not all(key(point) in done for _, point in grid):
        return []
    chosen = set()
    for measure, sign in MEASURES.items():
        values = [done[key(point)].user_attrs["measures"].get(measure) for _, point in grid]
        if any(value is not None for value in values):
            ranks = [sign * value if value is not None and math.isfinite(value) else math.inf for value in values]
            chosen |= set(sorted(range(len(grid)), key=ranks.__getitem__)[:FINALISTS])
    return [grid[number] for number in sorted(chosen)]
