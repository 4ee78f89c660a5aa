"""`get_robust_lowrank_model`: a model's linear layers become W = U S Vᵀ, in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_condlr.checkpoints.save import attach_saving
from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.conditioned_start import nearest_conditioned
from hf_condlr.conversion.factorizations import (
    FACTORIZATIONS,
    activation_aware,
    fisher,
    optimal_truncation_error,
    truncation_error,
)
from hf_condlr.conversion.ranks import requested_ranks
from hf_condlr.conversion.second_moments import Calibration, SecondMoments
from hf_condlr.conversion.targets import resolve_targets
from hf_condlr.errors import CondLRError, ConversionError
from hf_condlr.layers import (
    ConversionRecord,
    ConversionReport,
    Factors,
    LayerConversion,
    LowRankConv2d,
    LowRankLayer,
    LowRankLinear,
    conversion_record,
    factored_layers,
    head_names,
    replace_modules,
    set_conversion_record,
    weight_matrix,
)

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def get_robust_lowrank_model(
    model: Model, config: CondLRConfig, *, calibration_data: Iterable[Any] | None = None
) -> Model:
    """Convert the layers that `config` names to factors W = U S Vᵀ, in place.

    The model keeps its class, identity, dtype, device, training mode and `requires_grad`. `model.condlr` records the
    `config` and a `report` of each layer. Training keeps κ(S) ≤ 1 + τ once `attach_manifold_step(optimizer, model)` is
    called on an optimizer made *after* the conversion.

    Args:
        model: Any `nn.Module`; the head is found in transformers models.
        config: Layers, ranks, start and τ of the conversion.
        calibration_data: For the starts `activation_aware` and `fisher` and the allocation `fisher`: a data loader or
            any iterable of batches, of which the model gets what its forward accepts. Some hundred samples of the
            training data are enough. `fisher` differentiates the model's predictions: fine-tune it first.

    Returns:
        The same object.

    Raises:
        ConfigError: A rank exceeds a layer's, the budget cannot be met, or calibration data is missing or superfluous.
        ConversionError: Nothing matches, or a named layer cannot be converted (tied, quantized, grouped, read by its
            parent). After any error the model is as it was.
    """
    targets = resolve_targets(model, config)
    matrices = {name: _usable_matrix(model, name) for name in targets.names}
    calibration = Calibration(model, config, calibration_data)
    ranks, left_dense = requested_ranks(matrices, targets.heads, config, calibration)
    layers: dict[nn.Module, nn.Module] = {}
    report = ConversionReport(skipped=targets.skipped | left_dense)
    for name, second_moments in calibration.second_moments(ranks):
        dense = model.get_submodule(name)
        with _naming(name):
            layers[dense] = layer = _factored(dense, name, ranks[name], config, second_moments)
            report.converted[name] = _measured(matrices[name], layer, config, second_moments.C)
    # Nothing has changed so far: an error above leaves the model as it was.
    replace_modules(model, layers)
    _set_trainable(model, config)
    earlier = conversion_record(model).report
    if earlier is not None:  # a second conversion, of other layers
        report = ConversionReport(earlier.converted | report.converted, earlier.skipped | report.skipped)
    _warn_of_names_without_a_match(model, config, report)
    set_conversion_record(model, ConversionRecord(config, report))
    attach_saving(model)
    logger.info("%s", report)
    return model


def _usable_matrix(model: nn.Module, name: str) -> Tensor:  # (m, n)
    W = weight_matrix(model.get_submodule(name))
    if W.is_meta:
        received = "weights on the meta device"
    elif not torch.isfinite(W).all():
        received = "a weight that is not finite"
    elif not W.any():
        received = "a weight that is zero"
    else:
        return W
    rule = f"the weight of {name!r} must have values to factor"
    remedy = "Load or initialise the model first, or put the layer in exclude_modules."
    raise ConversionError(rule, received=received, remedy=remedy)


def _factored(dense: nn.Module, name: str, r: int, config: CondLRConfig, second_moments: SecondMoments) -> LowRankLayer:
    tau = config.tau_pattern.get(get_pattern_key(list(config.tau_pattern), name), config.tau)
    start = config.init_weights
    C = second_moments.C if start in ("activation_aware", "fisher") else None  # the ranks may have needed it
    F = second_moments.F if start == "fisher" else None

    def factorize(W: Tensor, r: int) -> Factors:
        if C is None:
            factors = FACTORIZATIONS[start](W, r)
        else:
            factors = activation_aware(W, r, C) if F is None else fisher(W, r, C, F)
        if config.conditioned_start:
            factors = nearest_conditioned(W, factors, tau, center=config.center, C=C, F=F)
        return factors

    layer_class = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
    return layer_class.from_dense(dense, r, factorize=factorize, tau=tau, center=config.center)


def _measured(W: Tensor, layer: LowRankLayer, config: CondLRConfig, C: Tensor | None) -> LayerConversion:
    factors = layer.U, layer.S, layer.V
    is_randomized = config.init_weights == "randomized_svd"
    return LayerConversion(
        r=layer.r,
        shape=(W.shape[0], W.shape[1]),
        truncation_error=truncation_error(W, *factors),
        optimal_truncation_error=optimal_truncation_error(W, layer.r) if is_randomized else None,
        whitened_truncation_error=None if C is None else truncation_error(W, *factors, C),
    )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the layer's name to errors."""
    try:
        yield
    except CondLRError as error:
        rule = f"{name!r} must be convertible: {error.rule}"
        raise type(error)(rule, received=error.received, remedy=error.remedy) from error
    except Exception as error:
        error.add_note(f"raised while {name!r} was factored")
        raise


def _warn_of_names_without_a_match(model: nn.Module, config: CondLRConfig, report: ConversionReport) -> None:
    """A misspelt name would otherwise be ignored silently."""
    patterns = [(name, key) for name in ("rank_pattern", "tau_pattern") for key in getattr(config, name)]
    unused = [
        f"{field_name}[{key!r}]"
        for field_name, key in patterns
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in report.converted)
    ]
    names, saved = [name for name, _ in model.named_modules()], config.modules_to_save or []
    unused += [f"modules_to_save {key!r}" for key in saved if not any(_saves(key, name) for name in names)]
    if unused:
        logger.warning("no layer matches %s", ", ".join(unused))


def _set_trainable(model: nn.Module, config: CondLRConfig) -> None:
    """Set `requires_grad` as `trainable` and `modules_to_save` ask; warn if the head is frozen."""
    keys = config.modules_to_save or []
    saved = {name: module for name, module in model.named_modules() if any(_saves(key, name) for key in keys)}
    if config.trainable == "factors":
        model.requires_grad_(False)
        for layer in factored_layers(model).values():
            layer.requires_grad_(True)
        heads = [name for name in sorted(head_names(model)) if name not in saved]
        if frozen := [name for name in heads if not model.get_submodule(name).weight.requires_grad]:
            logger.warning("the head %s is frozen; modules_to_save=%s trains it", ", ".join(frozen), frozen)
    for module in saved.values():
        module.requires_grad_(True)


def _saves(key: str, name: str) -> bool:
    """PEFT's rule for modules_to_save: the key is the name of the module, of a parent of it, or the end of either."""
    return re.match(rf"(^|.*\.){key}($|\..*)", name) is not None
