"""The factored layers of a model: which they are, which one is its head, and how modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.folded import FoldedLayer


def is_factored(model: nn.Module) -> bool:
    """Whether the model has layers that hold U, S, V: converted, loaded, wrapped or copied; not once it is folded."""
    return any(isinstance(module, LowRankLayer) for module in model.modules())


def factored_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """{name: layer} of all layers that hold U, S, V; a layer used in several places under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def compressed_layers(model: nn.Module) -> dict[str, LowRankLayer | FoldedLayer]:
    """{name: layer} of all factored and folded layers; a layer used in several places under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLayer, FoldedLayer))}


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand: a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def head_names(model: nn.Module) -> set[str]:
    """Names of the output embeddings and of linear layers outside the base model with one output per label or token."""
    if not isinstance(model, PreTrainedModel):
        return set()
    base = model.base_model
    inside = set() if base is model else set(base.modules())
    sizes = {getattr(model.config, "num_labels", None), getattr(model.config.get_text_config(), "vocab_size", None)}
    embeddings = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if embeddings is not None and module is embeddings}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in inside:
            continue
        is_child = "." not in name
        if base is model and not is_child:  # the model is its own base: only its direct children can be a head
            continue
        if module.out_features in sizes or (is_child and module.out_features == 1):
            names.add(name)
    return names
