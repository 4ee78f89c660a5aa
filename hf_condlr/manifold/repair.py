"""Bases that are not orthonormal, as after rounding to bfloat16 or foreign writes, made so without changing W."""

from __future__ import annotations

import math

import torch

from hf_condlr.distributed.sharded_linalg import orthonormality_error, orthonormalize
from hf_condlr.distributed.shards import full_tensor, write_full, write_local
from hf_condlr.errors import ConditioningError, require
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import is_orthonormal


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
