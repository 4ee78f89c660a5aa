"""`get_robust_lowrank_model`: a model's linear layers become W = U S Vᵀ, in place; and the ways back."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_condlr.config import CondLRConfig
from hf_condlr.errors import ConfigError, ConversionError
from hf_condlr.initialization import (
    optimal_truncation_error,
    spectral_energy,
    truncation_error,
    whitened_truncation_error,
)
from hf_condlr.layers import FoldedLayer, LowRankConv2d, LowRankLayer, LowRankLinear, weight_matrix
from hf_condlr.ranks import allocate_by_energy, allocate_uniform, break_even_rank, factored_size, round_down
from hf_condlr.saving import attach_saving, detach_saving
from hf_condlr.starts import NO_MOMENTS, Moments, calibrate, factorization, in_metric
from hf_condlr.targets import Place, head_names, resolve_targets

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
    whitened_truncation_error: float | None = None
    """‖(W − U S Vᵀ) C^{1/2}‖_F / ‖W C^{1/2}‖_F, C = E[x xᵀ] over the calibration data (a start that knows it)."""

    @property
    def parameters(self) -> int:
        """r(m + n) + r², the bias aside."""
        return factored_size(*self.shape, self.r)


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
def get_robust_lowrank_model(
    model: Model, config: CondLRConfig, *, calibration_data: Iterable[Any] | None = None
) -> Model:
    """Convert the layers that `config` names to factors W = U S Vᵀ, in place.

    The model keeps its class, identity, dtype, device, training mode and `requires_grad`. `model.condlr_config` holds
    the config and `model.condlr_conversion` a `ConversionReport`. Training keeps κ(S) ≤ 1 + τ once
    `attach_manifold_step(optimizer, model)` is called on an optimizer made *after* the conversion.

    Args:
        model: Any `nn.Module`; the head is found in transformers models.
        config: What to convert, and how.
        calibration_data: For the starts `activation_aware` and `fisher` and the allocation `fisher`: a data loader or
            any iterable of batches, of which the model gets what its forward accepts. Some hundred samples of the
            training data are enough. `fisher` differentiates the model's predictions: fine-tune it first.

    Returns:
        The same object.

    Raises:
        ConfigError: A rank exceeds a layer's, the budget cannot be met, or calibration data is missing or superfluous.
        ConversionError: Nothing matches, or a named layer cannot be converted (tied, quantized, grouped, read by its
            parent). The model is as it was.
    """
    targets, skipped = resolve_targets(model, config)
    report = ConversionReport(skipped=skipped)
    matrices = {name: weight_matrix(model.get_submodule(name)) for name in targets}
    for name, W in matrices.items():
        _refuse_unusable(name, W)
    moments = calibrate(model, config, list(targets), calibration_data)
    ranks = _ranks(matrices, targets, config, moments, report)
    layers = {}
    for name, r in ranks.items():
        W, (C, F) = matrices[name], moments.pop(name, NO_MOMENTS)
        dense: Any = model.get_submodule(name)
        layer_class: Any = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
        tau = config.tau_pattern.get(get_pattern_key(list(config.tau_pattern), name), config.tau)
        factorize = factorization(config, tau, C, F)
        layers[name] = layer_class.from_dense(dense, r, factorize=factorize, tau=tau, center=config.center)
        report.converted[name] = _measured(W, layers[name], config, C)
    # Only now: an error above leaves the model as it was.
    replace_modules(model, {model.get_submodule(name): layer for name, layer in layers.items()})
    _set_trainable(model, config)
    earlier = getattr(model, "condlr_conversion", None)
    if earlier is not None:  # a second conversion, of other layers
        report.converted = earlier.converted | report.converted
        report.skipped = earlier.skipped | report.skipped
    _warn_of_names_without_a_match(model, config, report)
    object.__setattr__(model, "condlr_config", config)
    object.__setattr__(model, "condlr_conversion", report)
    attach_saving(model)
    logger.info("%s", report)
    return model


def to_dense_model(model: Model) -> Model:
    """Multiply every factored layer out to an ordinary dense one, in place. κ and the outputs stay (to rounding).

    A model that has none is dense already and stays as it is.
    """
    _replace_layers(model, lambda layer: layer.to_dense())
    detach_saving(model)
    return model


def fold_model(model: Model) -> Model:
    """Join U S in every factored layer: two matrix products of r(m + n) weights, for inference; in place."""
    _replace_layers(model, lambda layer: layer.fold())
    return model


def _replace_layers(model: nn.Module, replace: Callable[[LowRankLinear | LowRankConv2d], nn.Module]) -> None:
    if isinstance(model, LowRankLayer):
        raise ConversionError(
            "the model must contain factored layers, not be one",
            received=type(model).__name__,
            remedy="Call the layer's own to_dense() or fold().",
        )
    layers = [m for m in model.modules() if isinstance(m, (LowRankLinear, LowRankConv2d))]
    if any(isinstance(m, FoldedLayer) for m in model.modules()):
        raise ConversionError(
            "a folded layer has lost its U and S",
            received="a folded model",
            remedy="Fold or multiply out a copy (copy.deepcopy) of the factored model.",
        )
    replace_modules(model, {layer: replace(layer) for layer in layers})
    for attribute in ("condlr_config", "condlr_conversion"):
        if hasattr(model, attribute):
            delattr(model, attribute)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand: a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


# ------------------------------------------------------------------------------------------------------- ranks


def _ranks(
    matrices: dict[str, Tensor],
    targets: dict[str, Place],
    config: CondLRConfig,
    moments: dict[str, Moments],
    report: ConversionReport,
) -> dict[str, int]:
    """The rank of every layer to convert. Those that stay dense under a budget go to the report."""
    ranks: dict[str, int] = {}
    budgeted: dict[str, tuple[int, int]] = {}
    for name, W in matrices.items():
        value = _explicit_rank(name, config, is_head=targets[name] == "head")
        if value is None:
            budgeted[name] = (W.shape[0], W.shape[1])
            continue
        full = min(W.shape)
        if isinstance(value, int) and value > full:
            raise ConfigError(
                f"the rank of {name!r} is at most min(in, out) = {full}",
                received=f"r={value}",
                remedy="Lower r, give rank_ratio instead, or set the layer apart in rank_pattern.",
            )
        if not isinstance(value, int):
            value = max(1, math.floor(value * full + 0.5))
            value = full if value == full else round_down(value, config.rank_multiple)
        ranks[name] = value
    _warn_where_larger(matrices, ranks)
    if not budgeted:
        return ranks
    assert config.compression_ratio is not None
    if config.rank_allocation == "uniform":
        allocated = allocate_uniform(budgeted, config.compression_ratio, config.rank_multiple)
    else:
        energies = {n: spectral_energy(in_metric(matrices[n], *moments.get(n, NO_MOMENTS))) for n in budgeted}
        ratio, multiple = config.compression_ratio, config.rank_multiple
        # What stays dense has no bound on κ; and where the error is a loss, no layer needs to be spared.
        leave_dense = config.rank_allocation == "energy"
        allocated = allocate_by_energy(budgeted, energies, ratio, multiple, leave_dense=leave_dense)
    report.skipped |= {n: "its factors would not be smaller" for n, r in allocated.items() if r is None}
    ranks |= {name: r for name, r in allocated.items() if r is not None}
    return {name: ranks[name] for name in matrices if name in ranks}


def _explicit_rank(name: str, config: CondLRConfig, *, is_head: bool) -> float | None:
    """int a rank, float a rank ratio, None: from the budget."""
    value = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name))
    if value is not None:
        return value
    if is_head and config.head == "full_rank":
        return 1.0
    return config.r if config.r is not None else config.rank_ratio


def _warn_where_larger(matrices: dict[str, Tensor], ranks: dict[str, int]) -> None:
    larger = [name for name, r in ranks.items() if r > break_even_rank(*matrices[name].shape)]
    if larger:
        logger.warning("factors are not smaller than the weight they replace in: %s", ", ".join(larger))


def _measured(W: Tensor, layer: LowRankLayer, config: CondLRConfig, C: Tensor | None) -> LayerConversion:
    U, S, V = layer.U, layer.S, layer.V
    return LayerConversion(
        r=layer.r,
        shape=(W.shape[0], W.shape[1]),
        truncation_error=truncation_error(W, U, S, V),
        optimal_truncation_error=optimal_truncation_error(W, layer.r)
        if config.init_weights == "randomized_svd"
        else None,
        whitened_truncation_error=None if C is None else whitened_truncation_error(W, C, U, S, V),
    )


def _refuse_unusable(name: str, W: Tensor) -> None:
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
    saved = [module for name, module in model.named_modules() if _is_saved(name, config)]
    if config.trainable == "factors":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LowRankLayer):
                module.requires_grad_(True)
        frozen = [n for n in sorted(head_names(model)) if not model.get_submodule(n).weight.requires_grad]
        if frozen := [name for name in frozen if not _is_saved(name, config)]:
            logger.warning("the head %s is frozen; modules_to_save=%s trains it", ", ".join(frozen), frozen)
    for module in saved:
        module.requires_grad_(True)


def _is_saved(name: str, config: CondLRConfig) -> bool:
    return any(_saves(key, name) for key in config.modules_to_save or [])


def _saves(key: str, name: str) -> bool:
    """PEFT's rule for modules_to_save: the name of the module, of a parent, or its end."""
    return re.match(rf"(^|.*\.){key}($|\..*)", name) is not None


def _warn_of_names_without_a_match(model: nn.Module, config: CondLRConfig, report: ConversionReport) -> None:
    """A misspelt name would otherwise be ignored without a word."""
    names = [name for name, _ in model.named_modules()]
    unused = [
        f"{field_name}[{key!r}]"
        for field_name in ("rank_pattern", "tau_pattern")
        for key in getattr(config, field_name)
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in report.converted)
    ]
    unused += [
        f"modules_to_save {key!r}"
        for key in config.modules_to_save or []
        if not any(_saves(key, name) for name in names)
    ]
    if unused:
        logger.warning("no layer matches %s", ", ".join(unused))
