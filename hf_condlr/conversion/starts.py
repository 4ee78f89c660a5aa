"""What a config's start and rank allocation take from calibration data, and the factorization that comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.calibration import input_covariances, repeatable
from hf_condlr.conversion.conditioned_start import nearest_conditioned
from hf_condlr.conversion.factorizations import FACTORIZATIONS, activation_aware, fisher, fisher_root, whiten
from hf_condlr.conversion.fisher import output_fisher
from hf_condlr.errors import ConfigError
from hf_condlr.layers import Factorization

Moments = tuple[Tensor | None, Tensor | None]  # C (n, n) of a layer's inputs, F (m, m) of its outputs' gradients


NO_MOMENTS: Moments = (None, None)


def calibrate(
    model: nn.Module, config: CondLRConfig, names: list[str], data: Iterable[Any] | None
) -> dict[str, Moments]:
    """What `config` asks for: C of each layer where something is aware of activations, F beside it for `fisher`.

    Raises:
        ConfigError: Data is missing or superfluous.
        ConversionError: It does not reach a layer, or the model has no logits to differentiate.
    """
    aware = config.needs_calibration_data
    if aware != (data is not None):
        raise ConfigError(
            "calibration_data is what 'activation_aware' and 'fisher' need, and nothing else",
            received=f"init_weights={config.init_weights!r}, rank_allocation={config.rank_allocation!r}, "
            f"{'no' if data is None else 'with'} calibration_data",
            remedy="Pass calibration_data=data_loader too." if aware else "Drop it, or choose one of them.",
        )
    if data is None:
        return {}
    batches = repeatable(data)  # gone over twice
    covariances = input_covariances(model, names, batches)
    needs_fisher = "fisher" in (config.init_weights, config.rank_allocation)
    fishers = output_fisher(model, names, batches) if needs_fisher else {}
    return {name: (covariances[name], fishers.get(name)) for name in names}


def factorization(config: CondLRConfig, tau: float, C: Tensor | None, F: Tensor | None) -> Factorization:
    """The start of `config` for a layer of that τ, as a function of a weight and its rank."""
    start = _start(config, C, F)
    if not config.conditioned_start:
        return start
    in_start = {  # the start's own metric: the ranks may have wanted more
        "C": C if config.init_weights in ("activation_aware", "fisher") else None,
        "F": F if config.init_weights == "fisher" else None,
    }
    return lambda W, r: nearest_conditioned(W, start(W, r), tau, center=config.center, **in_start)


def _start(config: CondLRConfig, C: Tensor | None, F: Tensor | None) -> Factorization:
    if config.init_weights == "fisher":
        assert C is not None and F is not None
        return partial(fisher, C=C, F=F)
    if config.init_weights == "activation_aware":
        assert C is not None
        return partial(activation_aware, C=C)
    return FACTORIZATIONS[config.init_weights]


def in_metric(W: Tensor, C: Tensor | None, F: Tensor | None) -> Tensor:  # (m, n) -> (m, n)
    """F̃^{1/2} W C^{1/2}, of which the roots of what was not measured are left out."""
    W = W if C is None else whiten(W, C)
    return W if F is None else fisher_root(F) @ W
