"""Makes the loader of factored checkpoints known to transformers, without importing it or transformers.

transformers' quantizers, where loaders are registered, import for more than a second. The first `from_pretrained` needs
them, so registration waits for their import. Then names stand for the loader until the first checkpoint is read.
"""

from __future__ import annotations

from typing import Any

from hf_condlr.after_import import after_import
from hf_condlr.checkpoints import METHOD


def register() -> None:
    """Register the loader, now or when transformers' registry is imported; called again it does nothing."""
    after_import("transformers.quantizers.auto", _add_loader)


def _add_loader(registry: Any) -> None:
    # transformers' functions that register want classes, whose bases would have to be imported: `load` calls them.
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
