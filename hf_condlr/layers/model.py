"""The factored layers of a model, its heads, and how modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from hf_condlr.layers.base import Factors, LowRankLayer
from hf_condlr.layers.inference import InferenceLayer
from hf_condlr.layers.update import LowRankUpdate


def is_factored(model: nn.Module) -> bool:
    """Whether the model has layers that hold U, S, V, converted ones or adapters; not once it is folded."""
    return any(isinstance(module, LowRankLayer) for module in model.modules())


def factored_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """{name: layer} of all that hold U, S, V, adapters too; a layer used in several places under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def converted_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The `factored_layers` that took the place of a dense layer: all but adapters, which PEFT saves and merges."""
    return {name: layer for name, layer in factored_layers(model).items() if not isinstance(layer, LowRankUpdate)}


def compressed_layers(model: nn.Module) -> dict[str, LowRankLayer | InferenceLayer]:
    """{name: layer} of all converted layers, folded ones too; a layer used in several places under its first name."""
    kinds, update = (LowRankLayer, InferenceLayer), LowRankUpdate
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, update)}


class ModuleTree:
    """The modules of a model, remembered, so that a change is noticed faster than by a walk through them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = self._present_children()

    def has_changed(self) -> bool:
        """Whether a module was added, removed or replaced: otherwise the children of each are the same objects."""
        return self._present_children() != self._children

    def _present_children(self) -> list[nn.Module | None]:
        return [child for module in self._modules for child in module._modules.values()]


def loaded_factors(model: nn.Module, name: str) -> Factors:
    """U, S, V of the factored layer `name`, read from the disk where `device_map` left it on the meta device."""
    layer: Any = model.get_submodule(name)
    if not any(p.is_meta for p in (layer.U, layer.S, layer.V)):
        return layer.U, layer.S, layer.V
    U, S, V = (load_offloaded_parameter(model, f"{name}.{part}") for part in "USV")  # type: ignore[arg-type]
    return U, S, V


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules in all places of the old ones: a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def head_names(model: nn.Module) -> set[str]:
    """Names of the heads: output embeddings, and the linear layers that make the predictions.

    In a transformers model these are the layers outside its base model with one output per label or token (one more
    for "no object"), or at most four (scores, start and end, boxes). Around a transformers model, in your own module,
    the last linear layer of each module next to it is a head. Wrappers such as DataParallel are looked through.
    """
    heads = _heads_of_model(model) if isinstance(model, PreTrainedModel) else _heads_around_models(model)
    return {name for name, module in model.named_modules() if module in heads}


def _heads_of_model(model: PreTrainedModel) -> set[nn.Module]:
    labels = getattr(model.config, "num_labels", 0)
    sizes = {1, 2, 3, 4, labels, labels + 1, getattr(model.config.get_text_config(), "vocab_size", None)}
    base, children = model.base_model, list(model.children())
    if base is not model:
        children = [m for child in children if child is not base for m in child.modules()]
    heads: set[nn.Module] = {m for m in children if isinstance(m, nn.Linear) and m.out_features in sizes}
    if (embeddings := model.get_output_embeddings()) is not None:
        heads.add(embeddings)
    if base is model:  # it may consist of an encoder and a decoder with a head, or of a detector
        inner = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
        heads = heads.union(*map(_heads_of_model, inner))
    return heads


def _heads_around_models(module: nn.Module) -> set[nn.Module]:
    heads: set[nn.Module] = set()
    children = {child: any(isinstance(m, PreTrainedModel) for m in child.modules()) for child in module.children()}
    for child, has_model in children.items():
        if isinstance(child, PreTrainedModel):
            heads |= _heads_of_model(child)
        elif has_model:
            heads |= _heads_around_models(child)
        elif any(children.values()):
            heads.update([m for m in child.modules() if isinstance(m, nn.Linear)][-1:])
    return heads
