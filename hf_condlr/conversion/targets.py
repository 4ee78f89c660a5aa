"""The layers of a model that a config selects: PEFT's rules for names, the head, layers that cannot be factored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.config import ALL_LINEAR, CondLRConfig
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import InferenceLayer, converted_layers, head_names

READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that hand their children's weights to fused kernels, without calling the children's forward."""

FORWARDS = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward, nn.Conv2d: nn.Conv2d.forward}


@dataclass
class Targets:
    """Result of `resolve_targets`."""

    heads: set[str]
    names: list[str] = field(default_factory=list)  # the layers to convert
    skipped: dict[str, str] = field(default_factory=dict)  # meant by "all-linear", but not convertible: the reason


def resolve_targets(model: nn.Module, config: CondLRConfig) -> Targets:
    """Find the layers to convert.

    Raises:
        ConversionError: A named layer cannot be converted, nothing matches, or there is no head to factor.
    """
    targets = Targets(head_names(model))
    if config.head == "full_rank" and not targets.heads:
        raise ConversionError(
            "head='full_rank' needs a head that can be found",
            received=f"a {type(model).__name__} with no output embeddings and no classifier known to transformers",
            remedy="Name the layer in target_modules and give it rank 1.0 in rank_pattern.",
        )
    tied, adapted = _names_of_tied_weights(model), _names_inside_adapters(model)
    for name, module in model.named_modules():
        is_named, is_swept = _wanted(name, module, config, is_head=name in targets.heads)
        if not is_named and not is_swept:
            continue
        reason = "part of a PEFT adapter" if name in adapted else _obstacle(model, name, module, tied)
        if reason == "":
            targets.names.append(name)
        elif reason is not None:
            rule, remedy = "a named layer must be convertible", "Put it in exclude_modules."
            require(not is_named, rule, received=f"{name!r}: {reason}", remedy=remedy, error=ConversionError)
            targets.skipped[name] = reason
    if not targets.names:
        raise _no_match(model, config, targets.skipped)
    return targets


def _wanted(name: str, module: nn.Module, config: CondLRConfig, *, is_head: bool) -> tuple[bool, bool]:
    """Whether the config names the module, and whether "all-linear" sweeps over it."""
    match = check_target_module_exists(config, name)
    if isinstance(match, _ExcludedModule):
        return False, False
    if is_head and config.head == "full_rank":
        return True, False
    if config.target_modules != ALL_LINEAR:
        return bool(match), False
    is_linear = isinstance(module, (nn.Linear, Conv1D)) or _has_fused_experts(module)
    return False, is_linear and not (is_head and config.head == "dense")


def _has_fused_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _obstacle(model: nn.Module, name: str, module: nn.Module, tied: set[str]) -> str | None:
    """Why a matching module cannot be converted; "" if it can, None if it is no layer with a weight matrix."""
    if _has_fused_experts(module):
        return "its experts are fused into tensors of three dimensions, not linear layers"
    known = next((cls for cls in FORWARDS if isinstance(module, cls)), None)
    weight = module._parameters.get("weight")
    if weight is None and known is not None:
        return "its weight is computed from other parameters (parametrized or pruned)"
    if known is None and not _has_weight_matrix(module):
        return None
    if known is None or weight is None:
        return f"a {type(module).__name__} is neither Linear, Conv1D nor Conv2d"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__} and no ordinary parameter (quantized, sharded or not loaded)"
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weight between devices; load the model without device_map to convert it"
    # Its own forward (quantized, masked, ...) does something else with the weight.
    if type(module).forward is not FORWARDS[known] or "forward" in vars(module):
        return f"a {type(module).__name__} with its own forward"
    if not weight.is_floating_point():
        return f"its weight is already quantized ({weight.dtype})"
    if name in tied:
        return "its weight is tied to another module"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a convolution with groups={module.groups}"
    if not name:
        return "the model is this layer itself; convert it with LowRankLinear.from_dense"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, InferenceLayer):
        return "part of a folded layer"
    if isinstance(parent, READS_WEIGHTS):
        return f"nn.{type(parent).__name__} multiplies by its weight itself"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "its hooks would be lost"
    return ""


def _has_weight_matrix(module: nn.Module) -> bool:
    """Whether a module has a `weight`, or the packed `qweight` of a quantized layer, of two dimensions or more."""
    tensors = module._parameters | module._buffers
    return any((X := tensors.get(name)) is not None and X.dim() > 1 for name in ("weight", "qweight"))


def _names_of_tied_weights(model: nn.Module) -> set[str]:
    found = [(name, p) for name, module in model.named_modules() for p in module._parameters.values() if p is not None]
    count = Counter(id(p) for _, p in found if p.dim() > 1)
    return {name for name, p in found if count[id(p)] > 1}


def _names_inside_adapters(model: nn.Module) -> set[str]:
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inside = {child for adapter in adapters for child in adapter.modules() if child is not adapter}
    return {name for name, module in model.named_modules() if module in inside}


def _no_match(model: nn.Module, config: CondLRConfig, skipped: dict[str, str]) -> ConversionError:
    given = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    received = ", ".join(f"{name}={value!r}" for name in given if (value := getattr(config, name)) is not None)
    if converted := len(converted_layers(model)):
        received += f" for a model in which {converted} layers are factored already"
    if skipped:
        received += f", which matches only {listed([f'{name} ({reason})' for name, reason in skipped.items()])}"
    candidates = [name for name, module in model.named_modules() if isinstance(module, tuple(FORWARDS))]
    shown = ", ".join(candidates[:40]) + (f" and {len(candidates) - 40} more" if len(candidates) > 40 else "")
    remedy = f"Linear and Conv2d layers of this {type(model).__name__}: {shown or 'none'}."
    return ConversionError("target_modules must match at least one layer", received=received, remedy=remedy)
