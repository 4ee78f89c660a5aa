"""Back from factored layers: folded for inference, or dense."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_condlr.checkpoints.save import detach_saving
from hf_condlr.conversion.convert import Model
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import (
    FoldedLayer,
    LowRankLayer,
    LowRankUpdate,
    factored_layers,
    replace_modules,
    set_conversion_record,
)


def to_dense_model(model: Model) -> Model:
    """Multiply every factored or folded layer out to a dense one, in place. κ and the outputs stay (to rounding).

    A model without factored layers stays as it is.
    """
    replace_modules(model, {m: m.to_dense() for m in model.modules() if isinstance(m, FoldedLayer)})
    _replace_layers(model, lambda layer: layer.to_dense())
    detach_saving(model)
    return model


def fold_model(model: Model) -> Model:
    """Join U S in every factored layer: two matrix products of r(m + n) weights, for inference; in place."""
    _replace_layers(model, lambda layer: layer.fold())
    return model


def _replace_layers(model: nn.Module, replace: Callable[[LowRankLayer], nn.Module]) -> None:
    rule, remedy = "the model must contain factored layers, not be one", "Call the layer's own to_dense() or fold()."
    received = type(model).__name__
    require(not isinstance(model, LowRankLayer), rule, received=received, remedy=remedy, error=ConversionError)
    is_folded = any(isinstance(module, FoldedLayer) for module in model.modules())
    rule, remedy = "a folded layer has lost its U and S", "Fold or multiply out a copy.deepcopy of the factored model."
    require(not is_folded, rule, received="a folded model", remedy=remedy, error=ConversionError)
    updates = [name for name, layer in factored_layers(model).items() if isinstance(layer, LowRankUpdate)]
    rule, remedy = (
        "an adapter is added to a dense weight, and takes no weight's place",
        "Call merge_and_unload() first.",
    )
    require(not updates, rule, received=f"adapters {listed(updates)}", remedy=remedy, error=ConversionError)
    replace_modules(model, {layer: replace(layer) for layer in factored_layers(model).values()})
    for module in model.modules():  # the record may be on a model inside, that of a PeftModel for instance
        set_conversion_record(module, None)
