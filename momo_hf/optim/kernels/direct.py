"""Compiled functions, called without the checks of torch.compile.

At every call torch.compile looks whether all that it took for constant is what it was. Between two batches of training, when
nothing of it is in the cache, that takes a quarter of a millisecond on a CPU, whatever the tensors: as long as a pass over half
a million elements.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from momo_hf.compat import compile_options


class Direct:
    """A function of tensors, by the compiler's code for it.

    The first call with a key goes through torch.compile, and so do all whose arguments cannot be told apart then. Later ones
    give their tensors to the code that the first one ran.

    Args:
        function: returns a list of new tensors; it may change others in place.
        options: of the compiler.
    """

    def __init__(self, function: Callable[..., list[Tensor]], options: dict[str, Any] | None) -> None:
        self._options = options
        self._ran: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._known: dict[Hashable, tuple[Callable[..., Any], list[int | None]]] = {}
        # With sizes, the compiler would also take floats for variable, and torch 2.13 may then find a graph in its cache on
        # disk that has the betas of another run in it.
        constant_floats = torch._dynamo.config.patch(specialize_float=True)
        compiled = torch.compile(function, dynamic=True, backend=self._compile, **compile_options())
        self._checked = constant_floats(compiled)

    def __call__(
        self, key: Hashable, size: int | None, tensors: list[Tensor], arguments: Callable[[], tuple[Any, ...]]
    ) -> Sequence[Tensor]:
        """Call the function.

        Args:
            key: of all that is constant in the arguments, whatever could make other code necessary.
            size: the only one that varies; None where there are others, and torch.compile has to look at every call.
            tensors: all that are in the arguments, in an order that the key determines.
            arguments: makes those of the function.
        """
        where = key, torch.get_num_threads()
        if size is not None and size < 2:
            size = None  # to the compiler 1 is a constant
        if size is not None and where in self._known:
            code, places = self._known[where]
            return code(*[size if place is None else tensors[place] for place in places])
        found = self._checked(*arguments())
        if size is not None and self._ran is not None:
            code, given = self._ran
            if (told := places_of(given, size, tensors)) is not None:
                self._known[where] = code, told
        self._ran = None  # or it would keep gradients
        return found

    def _compile(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        code: Any = compile_fx(graph, examples, config_patches=self._options)

        def run(*given: Any) -> Any:
            self._ran = code, given
            return code(*given)

        return run


def places_of(given: tuple[Any, ...], size: int, tensors: list[Tensor]) -> list[int | None] | None:
    """Where the code's arguments are among the tensors, None for the size; or None if that cannot be told."""
    places = {id(t): i for i, t in enumerate(tensors)}
    if len(places) < len(tensors) or not all(
        value == size if isinstance(value, int) else id(value) in places for value in given
    ):
        return None
    return [None if isinstance(value, int) else places[id(value)] for value in given]
