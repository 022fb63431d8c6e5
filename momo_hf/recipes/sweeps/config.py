"""What a sweep is, reading it from a file, and its points."""

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from transformers import Trainer, TrainingArguments

from momo_hf.optim.steps.search import AUTO
from momo_hf.recipes.config_file import read_config, unknown_name
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.sweeps.queue import Point, Queue, SharedStudy


@dataclass
class Sweep:
    """What a file in configs/sweeps holds.

    Args:
        script: the task's script, with a `main(argv)` that writes results.json.
        config: the task's config file.
        output_dir: folder of runs, storage, table and figures.
        metric: a number of results.json.
        optimizers: by name, the arguments that make each one (`optim`, `optim_args`, a schedule, ...), and with
            `learning_rates` a grid of its own; an empty grid means the optimizer's default alone.
        learning_rates: the grid of all others.
        seeds: of each point.
        arguments: for every run, on top of the config.
        direction: "minimize" or "maximize".
        more_metrics: other numbers of results.json for csv, table and figure, each with its direction.
        workers: runs at once.
        storage: optuna's; default: sqlite in the output folder.
        title: of the figure.
    """

    script: str
    config: str
    output_dir: str
    metric: str
    optimizers: dict[str, dict[str, Any]]
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    arguments: dict[str, Any] = field(default_factory=dict)
    direction: str = "minimize"
    more_metrics: dict[str, str] = field(default_factory=dict)
    workers: int = 2
    storage: str | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        for name, direction in {"direction": self.direction, **self.more_metrics}.items():
            if direction not in ("minimize", "maximize"):
                raise InputError(f"`{name}` must be 'minimize' or 'maximize', got {direction!r}.")
        if self.workers < 1:
            raise InputError(f"`workers` must be 1 or more, got {self.workers}.")
        if not self.optimizers:
            raise InputError("`optimizers` is empty: name at least one, such as `adamw: {optim: adamw_torch}`.")
        if not self.seeds or min(self.seeds) < 0:
            raise InputError(f"`seeds` must be a list of whole numbers from 0, such as [0, 1, 2], got {self.seeds}.")
        for path in (self.script, self.config):
            if not Path(path).is_file():
                raise InputError(f"The sweep names {path}, which does not exist.")
        self.grids = {name: self._grid(options) for name, options in self.optimizers.items()}

    def _grid(self, options: dict[str, Any]) -> list[float]:
        grid = options.get("learning_rates", self.learning_rates)
        if not _fits(grid, list[float]) or not all(lr > 0 for lr in grid):
            raise InputError(
                f"`learning_rates` must be a list of positive numbers, such as [1e-3, 1e-2], got {grid!r}."
            )
        if searches(options):
            if options.get("learning_rates"):
                raise InputError(
                    f"`learning_rates` must be empty where the optimizer searches for its own, got {grid!r}."
                )
            grid = []
        return sorted({*map(float, grid), default_lr(options)})

    @property
    def number_of_runs(self) -> int:
        return sum(map(len, self.grids.values())) * len(self.seeds)

    def points(self, optimizer: str) -> list[Point]:
        """Every learning rate and seed of an optimizer."""
        return [{"learning_rate": lr, "seed": seed} for lr in self.grids[optimizer] for seed in self.seeds]

    def study(self, optimizer: str) -> SharedStudy:
        """The study of one optimizer; created if it is not there, continued if it is.

        Raises:
            InputError: the storage cannot be opened.
        """
        return Queue(self.output_dir, self.storage, "sweep", self.direction).study(optimizer)

    @property
    def worst(self) -> float:
        return math.inf if self.direction == "minimize" else -math.inf


def load_sweep(path: str | Path, **changes: Any) -> Sweep:
    """Read a sweep from a YAML file; `changes` go on top, where they are not None.

    Raises:
        InputError: a name is unknown or missing, a value has the wrong type, or a file is missing.
    """
    values, lines = read_config(path)
    fields = {field.name: field for field in dataclasses.fields(Sweep)}
    for name, value in values.items():
        if name not in fields:
            raise InputError(unknown_name(str(name), fields), path, lines[name])
        if not _fits(value, fields[name].type):
            kind = fields[name].type
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise InputError(f"{name!r} must be of the type {wanted}, got {value!r}", path, lines[name])
    missing = [f.name for f in fields.values() if f.default is f.default_factory and f.name not in values]
    if missing:
        raise InputError(f"needs {', '.join(missing)} too", path)
    try:
        return Sweep(**values | {name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise InputError(str(error), path) from error


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    return kind is Any or isinstance(value, int | float if kind is float else kind)


def default_lr(options: dict[str, Any]) -> float:
    """The default of the optimizer's class for `lr`, by the arguments that make the optimizer; 1 where it searches for it."""
    cls, kwargs = _made(options)
    return 1.0 if kwargs.get("lr") == AUTO else float(inspect.signature(cls).parameters["lr"].default)


def searches(options: dict[str, Any]) -> bool:
    """Whether the optimizer that these arguments make searches for its learning rate, so that none is to be given."""
    return _made(options)[1].get("lr") == AUTO


def _made(options: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    made = {key: value for key, value in options.items() if key in ("optim", "optim_args")}
    return Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", report_to=[], use_cpu=True, **made))
