"""Makes the loader of factored checkpoints known to transformers, without importing it or transformers.

transformers' quantizers, where loaders are registered, import for more than a second. They are needed by the first
`from_pretrained`, so registration waits for their import: a finder in `sys.meta_path` sees it, lets it pass, registers,
and removes itself. Then the registered names stand for the loader until the first checkpoint is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hf_condlr.checkpoints import METHOD

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register the loader, now or when transformers' registry is imported. A second call changes nothing."""
    if REGISTRY in sys.modules:
        _add(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder that only watches for the registry."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                loader.exec_module = execute
                execute(module)
                _add(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = execute_and_add
        return spec


def _add(registry: Any) -> None:
    # Its functions that register want classes, whose bases would have to be imported; so does `load` later.
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _loader)


class _Config:
    """Stands for `FactoredCheckpointConfig` until it is imported."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        from hf_condlr.checkpoints.load import FactoredCheckpointConfig

        return FactoredCheckpointConfig.from_dict(values, **options)


def _loader(config: Any, **options: Any) -> Any:
    """Stands for `FactoredCheckpointLoader` until it is imported."""
    from hf_condlr.checkpoints.load import FactoredCheckpointLoader

    return FactoredCheckpointLoader(config, **options)
