"""Which factorization a layer starts from, and the metric that the start and the ranks measure errors in."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.conditioned_start import nearest_conditioned
from hf_condlr.conversion.factorizations import FACTORIZATIONS, activation_aware, fisher, fisher_root, whiten
from hf_condlr.conversion.second_moments import SecondMoments
from hf_condlr.layers import Factorization


def factorization(config: CondLRConfig, tau: float, second_moments: SecondMoments) -> Factorization:
    """The start of `config` for a layer with this τ, as a function of a weight and its rank."""
    C, F = second_moments if config.init_weights == "fisher" else (second_moments.C, None)
    if config.init_weights not in ("activation_aware", "fisher"):
        C = None  # the ranks may have needed it
    if F is not None and C is not None:
        start: Factorization = partial(fisher, C=C, F=F)
    elif C is not None:
        start = partial(activation_aware, C=C)
    else:
        start = FACTORIZATIONS[config.init_weights]
    if not config.conditioned_start:
        return start
    return lambda W, r: nearest_conditioned(W, start(W, r), tau, center=config.center, C=C, F=F)


def in_metric(W: Tensor, second_moments: SecondMoments) -> Tensor:  # (m, n) -> (m, n)
    """F̃^{1/2} W C^{1/2}, without the factor of what was not measured."""
    C, F = second_moments
    W = W if C is None else whiten(W, C)
    return W if F is None else fisher_root(F) @ W
