"""`LowRankUpdate`: the low-rank term beside a frozen dense weight, W₀ + s U S Vᵀ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_condlr.layers.linear import LowRankLinear
from hf_condlr.linalg import random_factors

START = 2.0**-40
"""σ(S) at the start. κ(S) does not depend on it, and added to W₀ it is less than float32 resolves."""


class LowRankUpdate(LowRankLinear):
    """x ↦ s U S Vᵀ x, added by the layer that holds it to a dense weight which stays.

    κ(S) = 1 has to hold at the start, at which the update has to be zero: κ does not depend on the scale of S, so that
    S = 2⁻⁴⁰ Q with an orthogonal Q does both, and the first optimizer step gives S its scale. U and V are random.

    Args:
        in_features, out_features, r, tau, device, dtype: As in `LowRankLinear`.
        scale: s > 0. Since U and V are orthonormal, ‖s U S Vᵀ‖ = s σ_max(S) whatever the rank.
    """

    def __init__(self, in_features: int, out_features: int, r: int, *, scale: float = 1.0, **options: Any) -> None:
        super().__init__(in_features, out_features, r, False, **options)
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:  # (*, n) -> (*, m)
        """Compute s U S Vᵀ x for each row of x."""
        return self.scale * super().forward(x)

    def matrix(self) -> Tensor:  # (m, n)
        """Multiply out ΔW = s U S Vᵀ in at least float32."""
        return self.scale * super().matrix()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start: orthonormal U, V and S = 2⁻⁴⁰ Q."""
        m, n = self.out_features, self.in_features
        self.set_factors(*random_factors(m, n, self.r, START, dtype=self.U.dtype, device=self.U.device))

    def extra_repr(self) -> str:
        """Describe shapes, rank, bound and scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"
