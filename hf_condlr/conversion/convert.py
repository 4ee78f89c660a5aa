"""`get_robust_lowrank_model`: a model's linear layers become W = U S Vᵀ, in place; and the ways back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_condlr.checkpoints.save import attach_saving
from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.ranks import requested_ranks
from hf_condlr.conversion.report import (
    ConversionReport,
    _measured,
)
from hf_condlr.conversion.starts import NO_MOMENTS, calibrate, factorization
from hf_condlr.conversion.targets import resolve_targets
from hf_condlr.errors import ConversionError
from hf_condlr.layers import LowRankConv2d, LowRankLayer, LowRankLinear, head_names, weight_matrix
from hf_condlr.layers.model import replace_modules

logger = logging.getLogger(__name__)


Model = TypeVar("Model", bound=nn.Module)


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
    ranks = requested_ranks(matrices, targets, config, moments, report)
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
