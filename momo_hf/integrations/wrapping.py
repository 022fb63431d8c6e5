"""How the functions of other libraries are wrapped."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


MARK = "wrapper"


def wrap_once(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Wrap a method of a class or a function of a module; once, also when the module of `wrap` is loaded again.

    Args:
        owner: the class or module.
        name: of the method or function.
        wrap: takes the original and returns what to call in its place.
    """
    original, mark = getattr(owner, name), f"{wrap.__module__}.{wrap.__qualname__}"
    if mark in _wrappers(original):
        return
    wrapper = functools.wraps(original)(wrap(original))
    setattr(wrapper, MARK, mark)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def _wrappers(function: Any) -> list[str]:
    """The names of the wrappers around a function, the outermost first."""
    names = []
    while function is not None:
        names.append(getattr(function, MARK, ""))
        function = getattr(function, "__wrapped__", None)
    return names
