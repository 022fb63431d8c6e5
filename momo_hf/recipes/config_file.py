"""Reading a YAML config: plain values by the rules of YAML 1.2, every name once, with the line that it stands in."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.files import read_lines


class _Loader(yaml.SafeLoader):
    """YAML 1.1, which PyYAML reads, takes `1e-3` for a text, `no` for false and `010` for 8; YAML 1.2 does not."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is there twice, first in line {lines[key.value]}; remove one",
                    problem_mark=key.start_mark,
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^({pattern})$"), first)


def read_config(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a file of `name: value` lines.

    Returns:
        The values, and the line of every name.

    Raises:
        InputError: the file is missing, is not YAML, is a list, or has a name twice.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"the config file {path} does not exist (looked for {path.absolute()})")
    loader = _Loader("\n".join(read_lines(path)))
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            problem = f"a config holds lines of the form `name: value`, but this is {kind}"
            raise InputError(problem, path, node.start_mark.line + 1)
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise InputError(" ".join(filter(None, (error.context, error.problem))), path, line) from error
    except yaml.YAMLError as error:
        raise InputError(f"is not YAML: {error}", path) from error
    return values, {key.value: key.start_mark.line + 1 for key, _ in node.value}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """The words for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"unknown name {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
