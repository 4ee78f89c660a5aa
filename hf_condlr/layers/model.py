"""The factored layers of a model: which they are, which one is its head, and how modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.folded import FoldedLayer


def compressed_layers(model: nn.Module) -> dict[str, LowRankLayer | FoldedLayer]:
    """Its factored and folded layers; one in several places under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLayer, FoldedLayer))}


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand: a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def factored_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """{name: layer} of all layers that hold U, S, V; one in several places under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def head_names(model: nn.Module) -> set[str]:
    """Output embeddings, and linear layers outside the base model that give one output per label, token or choice."""
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
        if base is model and not is_child:  # the model is its own base: only what stands directly in it can be a head
            continue
        if module.out_features in sizes or (is_child and module.out_features == 1):
            names.add(name)
    return names
