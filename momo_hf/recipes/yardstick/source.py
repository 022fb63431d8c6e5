"""What code a run was made by, so that a result is not taken for that of code that has changed since."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprint(files: Iterable[Path], package: str) -> str:
    """A short text that changes with the code of files and of what they import from a package, and of that in turn.

    Comments, docstrings and the layout do not count.

    Args:
        files: of Python.
        package: name of the package within which imports are followed.
    """
    digest = hashlib.sha256()
    for file in sorted(_with_imports(set(files), package), key=lambda file: (file.name, _code(file))):
        digest.update(_code(file).encode())
    return digest.hexdigest()[:16]


def fingerprint_of(file: str) -> str:
    """The fingerprint of one file of the recipes, for what it makes and keeps."""
    return fingerprint([Path(file)], "momo_hf.recipes")


def _with_imports(files: set[Path], package: str) -> set[Path]:
    found, new = set(files), list(files)
    while new:
        imported = set(filter(None, _imported(new.pop(), package)))
        new += imported - found
        found |= imported
    return found


def _imported(file: Path, package: str) -> Iterator[Path | None]:
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from (_file_of(alias.name, package) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of a package, or else something in a module
                yield _file_of(f"{node.module}.{alias.name}", package) or _file_of(node.module, package)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


@cache
def _code(file: Path) -> str:
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@cache
def _file_of(name: str, package: str) -> Path | None:
    if not f"{name}.".startswith(f"{package}."):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is no package
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
