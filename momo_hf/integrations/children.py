"""Processes that are started by spawn or forkserver import this package before they run the script again."""

from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from momo_hf.integrations.wrapping import wrap_once


class _InstallHere:
    """Unpickling it calls `install`, and imports the whole package for that."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return install, ()


def _get_preparation_data(original: Callable) -> Callable:
    def get_preparation_data(name: str) -> dict[str, Any]:
        # A child unpickles the whole of it before it acts on any of it, and takes no notice of keys that it does not know.
        return {**original(name), "momo_hf": _InstallHere()}

    return get_preparation_data


def install() -> None:
    """Let the children of this process, and theirs, know the names of the MoMo optimizers; once."""
    wrap_once(spawn, "get_preparation_data", _get_preparation_data)
