"""`get_robust_lowrank_model`: a model's linear layers become W = U S Vᵀ, in place; and the ways back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_condlr.config import ALL_LINEAR, CondLRConfig
from hf_condlr.errors import ConfigError, ConversionError
from hf_condlr.initialization import FACTORIZATIONS, optimal_truncation_error, truncation_error
from hf_condlr.layers import LowRankConv2d, LowRankLayer, LowRankLinear, weight_matrix

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class LayerConversion:
    """What became of one layer."""

    r: int
    shape: tuple[int, int]
    truncation_error: float
    """‖W − U S Vᵀ‖_F / ‖W‖_F."""
    optimal_truncation_error: float | None = None
    """The least error at this rank, measured where the start is not the optimum itself (`randomized_svd`)."""

    @property
    def parameters(self) -> int:
        """r(m + n) + r², the bias aside."""
        return self.r * sum(self.shape) + self.r**2


@dataclass
class ConversionReport:
    """Layers converted, and layers that match the targets but stay dense, with the reason."""

    converted: dict[str, LayerConversion] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        dense = sum(m * n for m, n in (layer.shape for layer in self.converted.values()))
        factored = sum(layer.parameters for layer in self.converted.values())
        lines = [f"{len(self.converted)} layers converted, {dense:,} weights became {factored:,}"]
        lines += [f"  left dense: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def get_robust_lowrank_model(model: Model, config: CondLRConfig) -> Model:
    """Convert the layers that `config` names to factors W = U S Vᵀ, in place.

    The model keeps its class, identity, dtype, device, training mode and `requires_grad`. `model.condlr_config` holds
    the config and `model.condlr_conversion` a `ConversionReport`. Training keeps κ(S) ≤ 1 + τ once
    `attach_manifold_step(optimizer, model)` is called on an optimizer made *after* the conversion.

    Args:
        model: Any `nn.Module`; the head is found in transformers models.
        config: What to convert, and how.

    Returns:
        The same object.

    Raises:
        ConversionError: Nothing matches, or a named layer cannot be converted (tied, quantized, grouped, read by its
            parent). The model is as it was.
    """
    targets, report = _resolve_targets(model, config)
    ranks = {name: _rank(name, model.get_submodule(name), config, targets[name]) for name in targets}
    _warn_where_larger(model, ranks)
    factorize = FACTORIZATIONS[config.init_weights]
    layers = {}
    for name, r in ranks.items():
        dense: Any = model.get_submodule(name)
        W = weight_matrix(dense)
        _refuse_unusable(name, W)
        layer_class: Any = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
        tau = config.tau_pattern.get(get_pattern_key(list(config.tau_pattern), name), config.tau)
        layer = layer_class.from_dense(dense, r, factorize=factorize, tau=tau, center=config.center)
        optimum = optimal_truncation_error(W, r) if config.init_weights == "randomized_svd" else None
        error = truncation_error(W, layer.U, layer.S, layer.V)
        report.converted[name] = LayerConversion(r, (W.shape[0], W.shape[1]), error, optimum)
        layers[name] = layer
    for name, layer in layers.items():  # only now: an error above leaves the model as it was
        model.set_submodule(name, layer)
    _set_trainable(model, config)
    object.__setattr__(model, "condlr_config", config)
    object.__setattr__(model, "condlr_conversion", report)
    logger.info("%s", report)
    return model


def to_dense_model(model: Model) -> Model:
    """Multiply every factored layer out to an ordinary dense one, in place. κ and the outputs stay (to rounding)."""
    return _replace_layers(model, lambda layer: layer.to_dense())


def fold_model(model: Model) -> Model:
    """Join U S in every factored layer: two matrix products of r(m + n) weights, for inference; in place."""
    return _replace_layers(model, lambda layer: layer.fold())


def _replace_layers(model: Model, replace: Callable[[LowRankLinear | LowRankConv2d], nn.Module]) -> Model:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (LowRankLinear, LowRankConv2d)):
            if not name:
                raise ConversionError(
                    "the model must contain the layer, not be it",
                    received=type(layer).__name__,
                    remedy="Call the layer's own to_dense() or fold().",
                )
            model.set_submodule(name, replace(layer))
    for attribute in ("condlr_config", "condlr_conversion"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model


# ----------------------------------------------------------------------------------------------------- targets


def _resolve_targets(model: nn.Module, config: CondLRConfig) -> tuple[dict[str, str], ConversionReport]:
    """{name: "body" or "head"} of the layers to convert, and the report with those skipped."""
    report = ConversionReport()
    heads = _head_names(model)
    by_name = config.target_modules != ALL_LINEAR
    tied = _names_of_tied_weights(model)
    targets: dict[str, str] = {}
    for name, module in model.named_modules():
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
            report.skipped[name] = reason
    if not targets:
        candidates = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Conv2d))]
        shown = ", ".join(candidates[:40]) + (f" and {len(candidates) - 40} more" if len(candidates) > 40 else "")
        raise ConversionError(
            "target_modules must match at least one layer",
            received=f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}",
            remedy=f"Linear and Conv2d layers of this {type(model).__name__}: {shown or 'none'}.",
        )
    return targets, report


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


# ------------------------------------------------------------------------------------------------------- ranks


def _rank(name: str, module: nn.Module, config: CondLRConfig, place: str) -> int:
    full = min(weight_matrix(module).shape)
    value: float | None = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name))
    if value is None and place == "head" and config.head == "full_rank":
        return full
    if value is None:
        value = config.r if config.r is not None else config.rank_ratio
    assert value is not None
    if isinstance(value, int) and value > full:
        raise ConfigError(
            f"the rank of {name!r} is at most min(in, out) = {full}",
            received=f"r={value}",
            remedy="Lower r, give rank_ratio instead, or set the layer apart in rank_pattern.",
        )
    return value if isinstance(value, int) else max(1, round(value * full))


def _warn_where_larger(model: nn.Module, ranks: dict[str, int]) -> None:
    larger = []
    for name, r in ranks.items():
        m, n = weight_matrix(model.get_submodule(name)).shape
        if r * (m + n) + r * r >= m * n:
            larger.append(f"{name} ({m}×{n}, r={r})")
    if larger:
        logger.warning("factors are not smaller than the dense weight in %d layers: %s", len(larger), ", ".join(larger))


def _refuse_unusable(name: str, W: torch.Tensor) -> None:
    received = "weights on the meta device" if W.is_meta else None
    if received is None and not torch.isfinite(W).all():
        received = "a weight that is not finite"
    if received is None and not W.any():
        received = "a weight that is zero"
    if received:
        raise ConversionError(
            f"the weight of {name!r} must have values to factor",
            received=received,
            remedy="Load or initialise the model first, or put the layer in exclude_modules.",
        )


def _set_trainable(model: nn.Module, config: CondLRConfig) -> None:
    saved = config.modules_to_save or []
    if config.trainable == "factors":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LowRankLayer):
                module.requires_grad_(True)
    for name, module in model.named_modules():
        if any(name == key or name.endswith(f".{key}") for key in saved):
            module.requires_grad_(True)
