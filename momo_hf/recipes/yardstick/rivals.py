"""What a rival is, a row of a YAML file; whether it can run here, and the optimizer that it makes.

configs/yardstick.yaml has the rows of this repository and says what a row holds.
"""

import importlib
import inspect
import itertools
from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from momo_hf.recipes.config_file import read_config, unknown_name
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.sweeps.queue import Point
from momo_hf.recipes.yardstick.loop import SCHEDULES
from momo_hf.recipes.yardstick.source import fingerprint


@dataclass(frozen=True)
class Rival:
    """An optimizer, and the grid of which it may take the best point.

    Args:
        name: of the row.
        optimizer: its class, as `module:Class`.
        arguments: of the class, beside parameters and learning rate.
        groups: a function from a model to parameter groups, as `module:function`; default: all that is trained.
        learning_rates: of the grid; none: the class's own default.
        schedules: of the grid, some of `SCHEDULES`.
        title: for tables and figure.
    """

    name: str
    optimizer: str
    arguments: dict[str, Any] = field(default_factory=dict)
    groups: str | None = None
    learning_rates: list[float] = field(default_factory=list)
    schedules: list[str] = field(default_factory=lambda: ["constant"])
    title: str = ""

    def __post_init__(self) -> None:
        for option in ("optimizer", "groups"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, str) or value.count(":") != 1):
                raise InputError(f"{self.name}: `{option}` must be of the form `module:name`, got {value!r}")
        rates = self.learning_rates
        if not isinstance(rates, list) or not all(isinstance(lr, (int, float)) and lr > 0 for lr in rates):
            raise InputError(f"{self.name}: `learning_rates` must be a list of positive numbers, got {rates!r}")
        if rates and "lr" in self.arguments:
            raise InputError(f"{self.name}: give `lr` among the `arguments`, or `learning_rates`, not both")
        if not isinstance(self.schedules, list) or not self.schedules or set(self.schedules) - set(SCHEDULES):
            allowed = ", ".join(SCHEDULES)
            raise InputError(f"{self.name}: `schedules` must be a list of some of {allowed}, got {self.schedules!r}")

    @property
    def label(self) -> str:
        """The title, with "best" before it where there is a choice."""
        return f"best {self.title}" if len(self.settings) > 1 else self.title

    @cached_property
    def settings(self) -> list[Point]:
        """The points of the grid, with all that makes a run of them but task, seed and steps."""
        whole = {"optimizer": self.optimizer, "arguments": self.arguments, "groups": self.groups, "code": self._code()}
        grid = itertools.product(map(float, self.learning_rates) if self.learning_rates else [None], self.schedules)
        return [whole | {"learning_rate": lr, "schedule": schedule} for lr, schedule in grid]

    def missing(self) -> str | None:
        """Why the rival cannot run here, or None."""
        for name in filter(None, (self.optimizer, self.groups)):
            module, _, attribute = name.partition(":")
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as error:
                return f"the package {error.name} is not installed"
            except ImportError as error:  # torch 2.8 has no Muon
                return str(error)
            if not hasattr(found, attribute):
                version = getattr(found, "__version__", None)
                return f"{module} has no {attribute}" + (f" in its version {version}" if version else "")
        return None

    def _code(self) -> str:
        files = defaultdict(set)
        for name in filter(None, (self.optimizer, self.groups)):
            found = load(name)
            for part in inspect.getmro(found) if inspect.isclass(found) else [found]:
                module = inspect.getmodule(part)
                file = getattr(module, "__file__", None)
                if module is not None and file:
                    files[module.__package__ or module.__name__].add(Path(file))
        return "-".join(fingerprint(files[package], package) for package in sorted(files))


def load(name: str) -> Any:
    """What `module:name` means."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_optimizer(setting: Point, model: nn.Module) -> Optimizer:
    """The optimizer of a setting for a model."""
    groups = (
        load(setting["groups"])(model) if setting["groups"] else [p for p in model.parameters() if p.requires_grad]
    )
    lr = {} if setting["learning_rate"] is None else {"lr": setting["learning_rate"]}
    return load(setting["optimizer"])(groups, **setting["arguments"], **lr)


def load_rivals(names: list[str], table: Path) -> list[Rival]:
    """Rows by their names, and all rows of other files by the paths of these.

    Args:
        names: of rows of the table, or files in .yaml; none: the whole table.
        table: the file of the repository.

    Raises:
        InputError: there is no such row or file, or a row is wrong.
    """
    known = _read(table)
    rivals: dict[str, Rival] = {} if names else known
    for name in names:
        if Path(name).suffix in (".yaml", ".yml"):
            rivals |= _read(Path(name))
        elif name in known:
            rivals[name] = known[name]
        else:
            raise InputError(
                f"{unknown_name(name, known)} Rivals are {', '.join(known)}, and rows of your own .yaml files."
            )
    return list(rivals.values())


def _read(path: Path) -> dict[str, Rival]:
    values, lines = read_config(path)
    allowed = [option.name for option in fields(Rival)][1:]
    rivals = {}
    for name, row in values.items():
        if not isinstance(row, dict) or "optimizer" not in row:
            raise InputError(
                f"{name!r} must be a row such as `{{optimizer: torch.optim:SGD}}`, got {row!r}", path, lines[name]
            )
        for option in row:
            if option not in allowed:
                raise InputError(unknown_name(str(option), allowed), path, lines[name])
        options: dict[str, Any] = {"title": name} | row
        try:
            rivals[name] = Rival(name, **options)
        except InputError as error:
            raise InputError(str(error), path, lines[name]) from error
    return rivals
