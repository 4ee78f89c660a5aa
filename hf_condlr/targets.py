"""Which layers of a model a config means: PEFT's rules for names, the head, and what cannot be factored."""

from __future__ import annotations

from typing import Literal

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_condlr.config import ALL_LINEAR, CondLRConfig
from hf_condlr.errors import ConversionError

Place = Literal["body", "head"]


def resolve_targets(model: nn.Module, config: CondLRConfig) -> tuple[dict[str, Place], dict[str, str]]:
    """The layers to convert, {name: body or head}, and those that "all-linear" means but that cannot be, with reasons.

    Raises:
        ConversionError: A named layer cannot be converted, or nothing matches.
    """
    skipped: dict[str, str] = {}
    heads = _head_names(model)
    by_name = config.target_modules != ALL_LINEAR
    tied = _names_of_tied_weights(model)
    targets: dict[str, Place] = {}
    for name, module in model.named_modules():
        if (
            not by_name
            and type(module).__name__.endswith("Experts")
            and any(p.dim() == 3 for p in module.parameters(False))
        ):
            skipped[name] = "its experts are fused into tensors of three dimensions, not linear layers"
        is_head = name in heads
        named = (by_name and _matches(config, name)) or (is_head and config.head == "full_rank")
        swept = not by_name and isinstance(module, (nn.Linear, Conv1D)) and not _excluded(config, name)
        if not named and not swept:
            continue
        if is_head and config.head == "dense" and not named:
            continue
        reason = _obstacle(model, name, module, tied)
        if reason == "":
            targets[name] = "head" if is_head else "body"
        elif reason is not None and named:
            raise ConversionError(
                "a named layer must be convertible", received=f"{name!r}: {reason}", remedy="Put it in exclude_modules."
            )
        elif reason is not None:
            skipped[name] = reason
    if not targets:
        candidates = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Conv2d))]
        shown = ", ".join(candidates[:40]) + (f" and {len(candidates) - 40} more" if len(candidates) > 40 else "")
        raise ConversionError(
            "target_modules must match at least one layer",
            received=f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}",
            remedy=f"Linear and Conv2d layers of this {type(model).__name__}: {shown or 'none'}.",
        )
    return targets, skipped


def _matches(config: CondLRConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def _excluded(config: CondLRConfig, name: str) -> bool:
    return isinstance(check_target_module_exists(config, name), _ExcludedModule)


def _obstacle(model: nn.Module, name: str, module: nn.Module, tied: set[str]) -> str | None:
    """Why a matching module cannot be converted: "" it can, None it is no layer with a weight matrix at all."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return None
    known = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward, nn.Conv2d: nn.Conv2d.forward}
    # A subclass with a forward of its own (quantized, masked, ...) does something else with its weight.
    if not any(isinstance(module, cls) and type(module).forward is forward for cls, forward in known.items()):
        return f"a {type(module).__name__} is neither Linear, Conv1D nor Conv2d"
    if not weight.is_floating_point():
        return f"its weight is already quantized ({weight.dtype})"
    if name in tied:
        return "its weight is tied to another module"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a convolution with groups={module.groups}"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies by its weight itself"
    if not name:
        return "the model is this layer itself; convert it with LowRankLinear.from_dense"
    return ""


def _names_of_tied_weights(model: nn.Module) -> set[str]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _head_names(model: nn.Module) -> set[str]:
    """Output embeddings, or else the linear layers outside the base model with one output per label or token."""
    if not isinstance(model, PreTrainedModel):
        return set()
    embeddings = model.get_output_embeddings()
    if embeddings is not None:
        return {name for name, module in model.named_modules() if module is embeddings}
    base = model.base_model
    inside = set(base.modules())
    config = model.config.get_text_config()
    sizes = {getattr(model.config, "num_labels", None), getattr(config, "vocab_size", None)}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and module.out_features in sizes
    }
