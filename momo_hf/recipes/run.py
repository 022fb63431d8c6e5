"""A run is a config file: reading it, and writing down what came out."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from datasets import disable_progress_bars
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from momo_hf.compat import training_arguments
from momo_hf.recipes.config_file import read_config, unknown_name
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.outputs import write_errors_named, write_json


PACKAGES = (
    "momo-hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "diffusers",
    "tokenizers",
    "numpy",
)


class _Parser(HfArgumentParser):
    """argparse's complaints as the errors they are, without two screens of usage before them."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help shows all arguments)")


def parse_run(dataclass_types: tuple[type, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Read `SCRIPT CONFIG.yaml [--any_argument value ...]`: the file first, the command line on top.

    A `~` at the start of a text stands for the home folder, as in a shell. `disable_tqdm` is for the bars of `datasets`
    too.

    Args:
        dataclass_types: dataclasses that hold the arguments.
        argv: the command line without the script's name; default: that of the process.

    Returns:
        One instance per dataclass.

    Raises:
        InputError: the file is missing or not a config, or an argument is unknown, missing or has a wrong value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser([DataClassType(cls) for cls in dataclass_types])
    path: Path | None = None
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise InputError("the first argument must be a config, a file in .yaml", path)
        values, lines = read_config(path)
    actions = {name[2:]: action for action in parser._actions for name in action.option_strings}
    from_file: list[str] = []
    for name, value in values.items():
        if name not in actions:
            raise InputError(unknown_name(str(name), actions), path, lines[name])
        if isinstance(value, list) and actions[name].nargs not in ("+", "*"):
            raise InputError(f"{name!r} takes one value, got the list {value}", path, lines[name])
        from_file += _words(name, value)
    try:
        *parts, rest = parser.parse_args_into_dataclasses(
            training_arguments(from_file + argv), return_remaining_strings=True
        )
    except ValueError as error:  # also of the dataclasses themselves, which check their values
        raise InputError(str(error), *_place(str(error), argv, path, lines)) from error
    if rest:
        name = rest[0].split("=")[0].lstrip("-")
        raise InputError(f"on the command line: {unknown_name(name, actions)}")
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, str) and value.startswith("~"):
                setattr(part, field.name, os.path.expanduser(value))
    if any(getattr(part, "disable_tqdm", False) for part in parts):
        disable_progress_bars()
    return tuple(parts)


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _place(message: str, argv: list[str], path: Path | None, lines: dict[str, int]) -> tuple[Path | None, int | None]:
    """Where an argument that a message begins with comes from: the config and a line, unless the command line has it."""
    found = re.match(r"argument --([^/:]+)", message)
    if found is None:
        return path, None
    name = found.group(1)
    if name not in lines or any(word.split("=")[0] == f"--{name}" for word in argv):
        return None, None
    return path, lines[name]


def write_results(output_dir: str, metrics: dict[str, Any], seconds: float, *arguments: Any, **more: Any) -> Path:
    """Write `results.json`: metrics, wall time, package versions and arguments of a run; and draw its `history`.

    Args:
        output_dir: folder of the run.
        metrics: numbers by name.
        seconds: wall time of the whole run.
        arguments: the dataclasses that the run was started with.
        more: further JSON values, for example samples; `history` becomes `training.png` too.

    Returns:
        The path of the file.
    """
    results = {
        "metrics": metrics,
        "seconds": seconds,
        **more,
        "machine": {"python": platform.python_version(), "system": platform.system(), "processor": platform.machine()},
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "arguments": {key: value for part in arguments for key, value in _as_dict(part).items()},
    }
    path = Path(output_dir) / "results.json"
    write_json(path, results)
    from momo_hf.recipes.curves import TRAINING, plot_training  # late, so that training begins sooner

    with write_errors_named(path.parent / TRAINING):
        plot_training(more.get("history", []), output_dir)
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_dict(arguments: Any) -> dict[str, Any]:
    return arguments.to_dict() if hasattr(arguments, "to_dict") else dataclasses.asdict(arguments)
