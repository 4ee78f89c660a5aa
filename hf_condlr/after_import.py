"""Do something when another library is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["after_import"]


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action(module)` now if the module `name` is imported, else right after its import.

    A finder in `sys.meta_path` sees the import, lets it pass, acts, and removes itself. The same action is not
    registered twice.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and finder.waits_for(name, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting:
    """A finder that only watches for one module."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def waits_for(self, name: str, action: Callable[[ModuleType], None]) -> bool:
        """Compare by names: a reloaded module has new functions."""
        return (self.name, self.action.__qualname__) == (name, action.__qualname__)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                loader.exec_module = execute
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.action(module)

            loader.exec_module = execute_and_act
        return spec
