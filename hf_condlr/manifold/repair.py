"""Factors that no step wrote: rounded to bfloat16, averaged, or edited."""

from __future__ import annotations

import math

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_condlr.distributed.sharded_linalg import orthonormality_error, orthonormalize
from hf_condlr.distributed.shards import full_tensor, write_full, write_local
from hf_condlr.errors import ConditioningError, require
from hf_condlr.layers import LowRankLayer, factored_layers
from hf_condlr.linalg import clamp_singular_values, condition_number, is_conditionable, is_orthonormal, obeys_bound


@torch.no_grad()
def enforce_constraint(model: nn.Module) -> None:
    """Bring every factored layer to the constraint now, in place: U, V orthonormal and κ(S) ≤ 1 + τ.

    Training needs it nowhere, since its steps do this. It is for factors that come from elsewhere, such as averages of
    the weights of several steps (EMA, SWA) or models (soups): the constraint is no convex set, and an average of
    factors within it is outside. U and V become orthonormal while W stays what it is; then the singular values of S
    that exceed the bound are clipped, which moves W as little as possible in the Frobenius norm (`center="nearest"`).

    Args:
        model: A model with factored layers.

    Raises:
        ConditioningError: There are no such layers; or factors are not finite, or a core is zero.
    """
    layers = factored_layers(extract_model_from_parallel(model))
    rule, remedy = "the model must have factored layers", "Convert it with get_robust_lowrank_model."
    require(bool(layers), rule, received="none", remedy=remedy, error=ConditioningError)
    orthonormalize_bases(layers)
    for name, layer in layers.items():
        S, remedy = full_tensor(layer.S), "Load or convert the model again."
        rule, received = "cores must not be zero", f"that of {name}"
        require(bool(is_conditionable(S)), rule, received=received, remedy=remedy, error=ConditioningError)
        if not obeys_bound(condition_number(S).item(), 1 + layer.tau):
            write_full(layer.S, clamp_singular_values(S, layer.tau, center=layer.center))
        layer.refresh_bound()


@torch.no_grad()
def orthonormalize_bases(layers: dict[str, LowRankLayer]) -> None:
    """Orthonormalise U and V where they are not orthonormal; S takes over their triangular factors.

    Raises:
        ConditioningError: A factor is not finite.
    """
    for name, layer in layers.items():
        errors = orthonormality_error(layer.U).item(), orthonormality_error(layer.V).item()
        require(
            math.isfinite(sum(errors)) and torch.isfinite(full_tensor(layer.S)).all(),
            "factors must be finite",
            received=f"NaN or inf in {name}",
            remedy="Load or convert the model again.",
            error=ConditioningError,
        )
        if not is_orthonormal(max(errors), layer.r):
            Q_U, S, Q_V = orthonormalize(layer.U, layer.S, layer.V)
            write_local(layer.U, Q_U)
            write_full(layer.S, S)
            write_local(layer.V, Q_V)
            layer.refresh_bound()
