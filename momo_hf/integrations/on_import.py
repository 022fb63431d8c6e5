"""Work to do when another package is imported, so that importing this one does not have to import it."""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class OnImport(threading.local, MetaPathFinder):
    """Calls `install()` of a module of ours after a module of another package was imported; a meta path finder that finds
    nothing itself.

    The call waits while modules of our package are half imported: they import the other packages too, and what is called
    may need all of them. Every thread waits for its own.

    Args:
        package: ours.
        modules: for the names of other modules the name of ours.
    """

    def __init__(self, package: str, modules: dict[str, str]) -> None:
        self._ours, self._modules = f"{package}.", modules
        self._half_imported = 0
        self._due: list[str] = []

    def install(self) -> None:
        """Watch all imports from now on, and see to what was imported before; once."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._due += [ours for name, ours in self._modules.items() if sys.modules.get(name) is not None]
        self._call_due()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that comes back to us after its work."""
        if name not in self._modules and not name.startswith(self._ours):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(self, spec, spec.loader)
        return spec

    def execute(self, loader: Loader, name: str, module: ModuleType) -> None:
        """Have a module executed by its loader, and then what is due."""
        ours = name.startswith(self._ours)
        self._half_imported += ours
        try:
            loader.exec_module(module)
        finally:
            self._half_imported -= ours
        if name in self._modules:
            self._due.append(self._modules[name])
        self._call_due()

    def _call_due(self) -> None:
        while self._due and not self._half_imported:
            importlib.import_module(self._due.pop(0)).install()


class _Watched(Loader):
    """Stands for the loader of a module until that is executed."""

    def __init__(self, finder: OnImport, spec: ModuleSpec, loader: Loader) -> None:
        self._finder, self._spec, self._loader = finder, spec, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever reads resources or source asks the loader of the module.
        self._spec.loader = module.__loader__ = self._loader
        self._finder.execute(self._loader, self._spec.name, module)
