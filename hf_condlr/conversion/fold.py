"""Back from factored layers: folded for inference, or dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from torch import nn

from hf_condlr.checkpoints.save import detach_saving
from hf_condlr.conversion.convert import Model
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import (
    InferenceForm,
    InferenceLayer,
    LowRankLayer,
    LowRankUpdate,
    compressed_layers,
    factored_layers,
    replace_modules,
    set_conversion_record,
)


def to_dense_model(model: Model) -> Model:
    """Multiply every factored, folded or pivoted layer out, in place. κ and the outputs stay, to rounding.

    A model without factored layers stays as it is.
    """
    replace_modules(model, {m: m.to_dense() for m in model.modules() if isinstance(m, InferenceLayer)})
    _replace_layers(model, lambda layer: layer.to_dense())
    detach_saving(model)
    return model


def fold_model(model: Model, form: InferenceForm = "folded") -> Model:
    """Put two ordinary layers in place of U, S, V in every factored layer, for inference; in place.

    Args:
        model: The model.
        form: `folded` for Vᵀ and U S, r(m + n) weights. `pivoted` for r rows of W and what the others are made of:
            r(m + n − r) weights, the fewest that a rank-r matrix has; see `PivotedLayer`.

    Raises:
        ConversionError: No such form, or the model has no factors (any more).
    """
    rule, remedy = f"form must be one of {', '.join(get_args(InferenceForm))}", "Choose one."
    require(form in get_args(InferenceForm), rule, received=repr(form), remedy=remedy, error=ConversionError)
    _replace_layers(model, lambda layer: layer.fold(form))
    if not compressed_layers(model):  # all were of full rank, which pivoted is dense
        detach_saving(model)
    return model


def _replace_layers(model: nn.Module, replace: Callable[[LowRankLayer], nn.Module]) -> None:
    rule, remedy = "the model must contain factored layers, not be one", "Call the layer's own to_dense() or fold()."
    received = type(model).__name__
    require(not isinstance(model, LowRankLayer), rule, received=received, remedy=remedy, error=ConversionError)
    is_folded = any(isinstance(module, InferenceLayer) for module in model.modules())
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
