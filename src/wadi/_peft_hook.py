"""Register this project's methods with PEFT when PEFT is imported. Importing PEFT here would cost ``wadi --help`` seconds.

PEFT has no plug-in mechanism. A process that has not registered LoRaD cannot read a LoRaD ``adapter_config.json``. If PEFT is
already imported, ``import wadi`` registers the methods at once. Otherwise it adds a finder to ``sys.meta_path``, which
registers them after PEFT's own import and then removes itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHODS = ("wadi.lorad", "wadi.full")  # each registers itself when it is imported


def register_methods() -> None:
    """Register the methods now. This imports PEFT."""
    for package in METHODS:
        importlib.import_module(package)


class _RegisterAfter(Loader):
    """Run PEFT's own loader, then register the methods."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder)]
        self.loader.exec_module(module)
        register_methods()

    def __getattr__(self, name: str) -> object:  # get_source, is_package, resource readers, ...
        return getattr(self.loader, name)


class _PeftFinder(MetaPathFinder):
    """Stays in place until PEFT is imported. Some libraries only look up its spec, to see whether it is installed."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.searching:
            return None
        self.searching = True  # leave the search below to the usual finders
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_when_peft_is_imported() -> None:
    """Register the methods with ``peft``, now or when it is first imported."""
    if "peft" in sys.modules:
        register_methods()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
