"""The tolerances of the guarantee that holds after every manifold step. Every check uses these."""

from __future__ import annotations

import math
from typing import Any, overload

from torch import Tensor

ORTHONORMALITY_TOLERANCE = 1e-5
"""‖UᵀU − I‖_F ≤ this · √r in float32, likewise V."""

KAPPA_TOLERANCE = 1e-4
"""κ(S) ≤ (1 + τ)(1 + this) in float32."""


@overload
def obeys_bound(kappa: float, bound: float) -> bool: ...
@overload
def obeys_bound(kappa: Tensor, bound: Tensor) -> Tensor: ...
def obeys_bound(kappa: Any, bound: Any) -> Any:
    """Whether κ(S) ≤ `bound` up to rounding, of numbers or of tensors entry by entry; False for NaN."""
    return kappa <= bound * (1 + KAPPA_TOLERANCE)


def is_orthonormal(error: float, r: int) -> bool:
    """Whether ‖UᵀU − I‖_F = `error` of an (m, r) basis is within rounding of 0; False for NaN."""
    return error <= ORTHONORMALITY_TOLERANCE * math.sqrt(r)
