"""Makes the loader of factored checkpoints known to transformers, without importing it or transformers.

transformers' quantizers, where loaders are registered, import for more than a second. They are needed by the first
`from_pretrained`, so registration waits for their import (`after_import`). From then on the registered names stand for
the loader until the first checkpoint is read.
"""

from __future__ import annotations

from typing import Any

from hf_condlr.after_import import after_import
from hf_condlr.checkpoints import METHOD

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register the loader, now or when transformers' registry is imported. A second call changes nothing."""
    after_import(REGISTRY, _add_loader)


def _add_loader(registry: Any) -> None:
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
