"""Pure, batched linear algebra of the constraint W = U S Vᵀ, UᵀU = VᵀV = I, κ(S) ≤ 1 + τ.

Every function takes stacks of matrices `(*, m, r)`, in any floating dtype on any device, computes in at least
float32 and returns the dtype it was given. Source: Savostianova et al., NeurIPS 2023 (arXiv 2306.01485).
"""

from hf_condlr.linalg.conditioning import (
    CENTERS,
    ROUNDING_TOLERANCE,
    Center,
    clamp_singular_values,
    is_conditionable,
)
from hf_condlr.linalg.guarantee import KAPPA_TOLERANCE, ORTHONORMALITY_TOLERANCE, is_orthonormal, obeys_bound
from hf_condlr.linalg.newton_schulz import LARGEST_BOUND, clip_core_by_products
from hf_condlr.linalg.precision import full_precision, per_matrix, wide_device
from hf_condlr.linalg.stiefel import (
    inverse_cholesky,
    orthonormality_error,
    project_horizontal,
    project_tangent,
    random_factors,
    retract_cholesky,
    retract_polar,
    retract_qr,
)
from hf_condlr.linalg.svd import (
    condition_number,
    robust_eigh,
    robust_svd,
    singular_value_range,
    singular_values,
    truncated_svd,
)

__all__ = [
    "CENTERS",
    "KAPPA_TOLERANCE",
    "LARGEST_BOUND",
    "ORTHONORMALITY_TOLERANCE",
    "ROUNDING_TOLERANCE",
    "Center",
    "clamp_singular_values",
    "clip_core_by_products",
    "condition_number",
    "full_precision",
    "inverse_cholesky",
    "is_conditionable",
    "is_orthonormal",
    "obeys_bound",
    "orthonormality_error",
    "per_matrix",
    "project_horizontal",
    "project_tangent",
    "random_factors",
    "retract_cholesky",
    "retract_polar",
    "retract_qr",
    "robust_eigh",
    "robust_svd",
    "singular_value_range",
    "singular_values",
    "truncated_svd",
    "wide_device",
]
