"""A run is a config file: reading it, and writing down what came out."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


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


def parse_run(dataclass_types: tuple[type, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Read `SCRIPT CONFIG.yaml [--any_argument value ...]`: the file first, the command line on top.

    Args:
        dataclass_types: dataclasses that hold the arguments.
        argv: the command line without the script's name; default: that of the process.

    Returns:
        One instance per dataclass.

    Raises:
        SystemExit: an argument is unknown or has a wrong value (argparse says which), or the file is missing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types)
    from_file: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = Path(argv.pop(0))
        if not path.is_file():
            parser.error(f"the config file {path} does not exist")
        for key, value in (yaml.safe_load(path.read_text("utf-8")) or {}).items():
            if isinstance(value, dict):
                from_file += [f"--{key}", json.dumps(value)]
            elif isinstance(value, list):
                from_file += [f"--{key}", *map(str, value)]
            elif value is not None:
                from_file.append(f"--{key}={value}")
    return parser.parse_args_into_dataclasses(from_file + argv)


def write_results(output_dir: str, metrics: dict[str, Any], seconds: float, *arguments: Any, **more: Any) -> Path:
    """Write `results.json`: metrics, wall time, package versions and arguments of a run.

    Args:
        output_dir: folder of the run.
        metrics: numbers by name.
        seconds: wall time of the whole run.
        arguments: the dataclasses that the run was started with.
        more: further JSON values, for example samples.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_dict(arguments: Any) -> dict[str, Any]:
    return arguments.to_dict() if hasattr(arguments, "to_dict") else dataclasses.asdict(arguments)
