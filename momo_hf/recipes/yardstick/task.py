"""What a task is, and finding it: a file of `tasks` by its name, or anybody's by its path.

A task's file holds

* `STEPS` and `BATCH_SIZE`, of a run;
* `data(places)`: reads or makes the rows, `Data(train, held_out, ...)`, or a plain pair of both;
* `model(data)`: a new model; the seed is set before;
* `loss(model, batch)`: the loss of a batch, a tensor without dimensions, with gradients;
* `held_out(model, data)`: numbers that measure the model, `{"loss": ...}` and for a classifier `"accuracy"` (from 0 to
  1); the model is in eval mode, and no gradients are taken;

and if it wants to

* `TITLE`, for tables and figure;
* `DATA` and `PACKAGES`: names of folders in `--data`, and of Python packages, without which the task is left out;
* `BY_ACCURACY = True` where the loss of good models is so near 0 that a ratio of two says nothing.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from momo_hf.recipes.config_file import unknown_name
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.yardstick import loop
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.source import fingerprint
from momo_hf.recipes.yardstick.tasks import TASKS


FUNCTIONS = ("data", "model", "loss", "held_out")
NUMBERS = ("STEPS", "BATCH_SIZE")


@dataclass(frozen=True)
class Task:
    """A task as its file describes it; `code` changes with the file, and with what it uses of the recipes."""

    name: str
    title: str
    steps: int
    batch_size: int
    needs_data: tuple[str, ...]
    needs_packages: tuple[str, ...]
    by_accuracy: bool
    data: Callable[[Places], Any]
    model: Callable[[Data], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Callable[[nn.Module, Data], dict[str, float]]
    code: str

    def read(self, places: Places) -> Data:
        """The rows of the task."""
        return Data(*self.data(places))

    def missing(self, places: Places) -> str | None:
        """What the task needs and is not there, or None."""
        for name in self.needs_packages:
            if importlib.util.find_spec(name) is None:
                return f"the package {name.replace('_', '-')} is not installed"
        for name in self.needs_data:
            if places.data is None or not places.data.joinpath(name).is_dir():
                return f"its data are not there: a folder {name!r} in the folder that --data names"
        return None


def load_task(name: str) -> Task:
    """A task of this package by its name, or of a file by its path.

    Raises:
        InputError: there is no such task, or something is missing in its file.
    """
    module = _own(Path(name)) if name.endswith(".py") else _built_in(name)
    path = Path(module.__file__ or "")
    for function in FUNCTIONS:
        if not callable(getattr(module, function, None)):
            raise InputError(f"a task has the functions {', '.join(FUNCTIONS)}, but {function!r} is missing", path)
    for number in NUMBERS:
        value = getattr(module, number, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"`{number}` must be a whole number from 1, such as `{number} = 100`, got {value!r}", path
            )
    return Task(
        name=path.stem,
        title=getattr(module, "TITLE", path.stem),
        steps=module.STEPS,
        batch_size=module.BATCH_SIZE,
        needs_data=tuple(getattr(module, "DATA", ())),
        needs_packages=tuple(getattr(module, "PACKAGES", ())),
        by_accuracy=getattr(module, "BY_ACCURACY", False),
        **{function: getattr(module, function) for function in FUNCTIONS},
        code=fingerprint((path, Path(loop.__file__)), "momo_hf.recipes"),
    )


def _built_in(name: str) -> ModuleType:
    if name not in TASKS:
        raise InputError(
            f"{unknown_name(name, TASKS)} Tasks are {', '.join(TASKS)}; one of your own is named by a .py file."
        )
    return importlib.import_module(f"momo_hf.recipes.yardstick.tasks.{name}")


def _own(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"the task {path} does not exist (looked for {path.absolute()})")
    spec = importlib.util.spec_from_file_location(f"yardstick_task_{path.stem}", path.absolute())
    assert spec is not None and spec.loader is not None  # Python has a loader for every .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
