"""Factors of a model that `device_map` offloaded: on the meta device, with their values on the disk."""

from __future__ import annotations

from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter

from hf_condlr.layers.base import Factors, LowRankLayer


def loaded_factors(model: nn.Module, name: str) -> Factors:
    """U, S, V of the factored layer `name`, with values, also where the layer is offloaded."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLayer)
    if not any(p.is_meta for p in (layer.U, layer.S, layer.V)):
        return layer.U, layer.S, layer.V
    U, S, V = (load_offloaded_parameter(model, f"{name}.{part}") for part in "USV")  # type: ignore[arg-type]
    return U, S, V
