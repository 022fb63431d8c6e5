"""Work to do when another package is imported, so that importing this one does not have to import it."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class OnImport(MetaPathFinder):
    """Imports a module of ours right after a module of another package; a meta path finder that finds nothing itself.

    Args:
        ours: for the names of other modules the name of ours, which does its work when it is imported.
    """

    def __init__(self, ours: dict[str, str]) -> None:
        self._ours = ours

    def install(self) -> None:
        """Watch all imports from now on, and see to what was imported before."""
        sys.meta_path.insert(0, self)
        for name in self._ours:
            if sys.modules.get(name) is not None:
                importlib.import_module(self._ours[name])

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that imports our module after its own work."""
        if name not in self._ours:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self._ours[name])

            spec.loader.exec_module = exec_module
        return spec
