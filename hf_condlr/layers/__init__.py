"""Layers whose weight is W = U S Vᵀ, and their way from and to dense layers.

U (m, r) and V (n, r) have orthonormal columns, S (r, r) is dense; m = out_features, n = in_features. The layers only
compute: `attach_manifold_step` keeps the constraint while an optimizer moves the factors.
"""

from hf_condlr.layers.base import (
    Factorization,
    Factors,
    FoldedLayer,
    LowRankLayer,
    factored_layers,
    weight_matrix,
)
from hf_condlr.layers.conv2d import LowRankConv2d
from hf_condlr.layers.linear import LowRankLinear

__all__ = [
    "Factorization",
    "Factors",
    "FoldedLayer",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "factored_layers",
    "weight_matrix",
]
