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
from tqdm.auto import tqdm

from hf_condlr.checkpoints.save import attach_saving
from hf_condlr.config import DATA_AWARE, CondLRConfig
from hf_condlr.conversion.conditioned_start import nearest_conditioned
from hf_condlr.conversion.factorizations import FACTORIZATIONS, optimal_truncation_error, truncation_error
from hf_condlr.conversion.ranks import requested_ranks
from hf_condlr.conversion.second_moments import Calibration
from hf_condlr.conversion.statistics import Measured, Statistics
from hf_condlr.conversion.targets import resolve_targets
from hf_condlr.errors import CondLRError, ConfigError, ConversionError, require
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
    model: Model,
    config: CondLRConfig,
    *,
    calibration_data: Iterable[Any] | Calibration | None = None,
    processing_class: Any = None,
) -> Model:
    """Convert the layers that `config` names to factors W = U S Vᵀ, in place.

    The model keeps its class, identity, dtype, device, training mode and `requires_grad`. `model.condlr` records the
    `config` and a `report` of each layer. Training keeps κ(S) ≤ 1 + τ once `attach_manifold_step(optimizer, model)` is
    called on an optimizer made *after* the conversion.

    Args:
        model: Any `nn.Module`; the head is found in transformers models.
        config: Layers, ranks, start and τ of the conversion.
        calibration_data: For the starts `activation_aware` and `fisher` and the allocations that need them: a data
            loader or any iterable of batches, of which the model gets what its forward accepts; texts, images or a
            Dataset with `processing_class`; or a `Calibration`, which remembers what was measured. Some hundred samples
            of the training data are enough. `fisher` differentiates the model's predictions: fine-tune it first. With
            `sequential_calibration` all batches are kept until the end.
        processing_class: A tokenizer, image processor or processor for calibration data that are no batches yet.

    Returns:
        The same object.

    Raises:
        ConfigError: A rank exceeds a layer's, the budget cannot be met, or calibration data is missing or superfluous.
        ConversionError: Nothing matches, or a named layer cannot be converted (tied, quantized, grouped, read by its
            parent). After any error the model is as it was.
    """
    targets = resolve_targets(model, config)
    matrices = {name: _usable_matrix(model, name) for name in targets.names}
    statistics = Statistics(model, matrices, config, _calibration(config, calibration_data, processing_class))
    ranks, left_dense = requested_ranks(matrices, targets.heads, config, statistics.energies)
    layers: dict[nn.Module, nn.Module] = {}
    report = ConversionReport(skipped=targets.skipped | left_dense)
    measured = statistics.in_sequence(ranks, layers) if config.sequential_calibration else statistics.in_turns(ranks)
    for name, second_moments in tqdm(measured, desc="factorization", total=len(ranks), disable=None):
        dense = model.get_submodule(name)
        with _naming(name):
            layers[dense], report.converted[name] = _factored(dense, name, ranks[name], config, second_moments)
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


def _calibration(config: CondLRConfig, data: Any, processing_class: Any) -> Calibration | None:
    needed, given = config.needs_calibration_data, data is not None
    require(
        needed == given,
        "calibration_data is what 'activation_aware' and 'fisher' need, and nothing else",
        received=f"init_weights={config.init_weights!r}, rank_allocation={config.rank_allocation!r}, "
        f"{'with' if given else 'no'} calibration_data",
        remedy="Pass calibration_data=data_loader too." if needed else "Drop it, or choose one of them.",
        error=ConfigError,
    )
    processes = given and not isinstance(data, Calibration)
    rule, remedy = "processing_class makes batches of calibration_data", "Pass it to Calibration, or drop it."
    received = "none, or a Calibration"
    require(processing_class is None or processes, rule, received=received, remedy=remedy, error=ConfigError)
    return Calibration(data, processing_class=processing_class, remember=False) if processes else data


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


def _factored(
    dense: nn.Module, name: str, r: int, config: CondLRConfig, measured: Measured
) -> tuple[LowRankLayer, LayerConversion]:
    tau = config.tau_pattern.get(get_pattern_key(list(config.tau_pattern), name), config.tau)
    start, C = config.init_weights, measured.C
    is_aware = start in DATA_AWARE  # C may be there for the ranks only
    F = measured.F if start == "fisher" else None

    def factorize(W: Tensor, r: int) -> Factors:
        W = W if measured.target is None else measured.target
        factors = measured.spectrum(W, F).factors(W, r, F) if is_aware else FACTORIZATIONS[start](W, r)
        if config.conditioned_start:
            C_of_start = C if is_aware else None
            factors = nearest_conditioned(W, factors, tau, center=config.center, C=C_of_start, F=F)
        return factors

    layer_class = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
    layer = layer_class.from_dense(dense, r, factorize=factorize, tau=tau, center=config.center)
    W, factors = weight_matrix(dense), (layer.U, layer.S, layer.V)
    target = W if measured.target is None else measured.target
    return layer, LayerConversion(
        r=layer.r,
        shape=(W.shape[0], W.shape[1]),
        truncation_error=truncation_error(W, *factors),
        optimal_truncation_error=optimal_truncation_error(W, layer.r) if start == "randomized_svd" else None,
        whitened_truncation_error=None if C is None else truncation_error(target, *factors, C),
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
