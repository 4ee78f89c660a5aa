"""`CayleySGD`: SGD with momentum on the Stiefel manifold, along an iterated Cayley transform.

Source: Li, Fuxin, Todorovic, *Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform*,
ICLR 2020 (arXiv 2002.01113), algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_condlr.linalg import retract_cholesky, retract_qr
from studies.paper.baselines.stiefel import StiefelSGD


class CayleySGD(StiefelSGD):
    """SGD with momentum and orthonormal weights, by the Cayley transform of the projected momentum.

    With X (p, q), p ≥ q, XᵀX = I, the gradient G and the momentum M:

        M ← β M − G
        Ŵ = M Xᵀ − ½ X (Xᵀ M Xᵀ),  W = Ŵ − Ŵᵀ, skew
        M ← W X, the projection on the tangent space
        α = min(lr, 2 contraction / (‖W‖_F + 10⁻⁸))
        Y ← X + α M, then `iterations` times Y ← X + (α/2) W (X + Y)

    The iteration tends to the Cayley transform (I − αW/2)⁻¹ (I + αW/2) X, which is orthonormal, with an error that
    falls by α‖W‖/2 ≤ contraction each time. What is left of it after so few is removed by a Cholesky-QR at every step
    (the authors' program does a QR at one step in a hundred, drawn by chance). ‖W‖ is Frobenius' norm here, which
    bounds the spectral norm; theirs is the largest column sum, which takes W itself. No p×p matrix is formed anywhere:
    W = P Xᵀ − X Pᵀ with P = M − ½ X (XᵀM).

    Args:
        params: Parameters, or groups with `stiefel=True` for orthonormal weights, see `stiefel_groups`; the others
            get plain SGD with momentum.
        lr: l, the largest step.
        momentum: β.
        iterations: s, of the fixed-point iteration.
        contraction: q in (0, 1), its factor at most.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.0, iterations: int = 2, contraction: float = 0.5
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, iterations=iterations, contraction=contraction)

    def stiefel_step(self, X: Tensor, G: Tensor, M: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The next weight and momentum, (p, q) each."""
        M = group["momentum"] * M - G
        XP = X.mT @ M / 2  # XᵀP, as XᵀX = I
        P = M - X @ XP

        def W(Z: Tensor) -> Tensor:  # (p, q) -> (p, q)
            return P @ (X.mT @ Z) - X @ (P.mT @ Z)

        M = P - X @ XP.mT  # W X
        # ‖PXᵀ − XPᵀ‖² = 2‖P‖² − 2 tr((XᵀP)²); below 0 only by rounding.
        norm = (2 * P.square().sum() - 2 * (XP * XP.mT).sum()).clamp_min(0).sqrt()
        step = torch.clamp(2 * group["contraction"] / (norm + 1e-8), max=group["lr"])
        Y = X + step * M
        for _ in range(group["iterations"]):
            Y = X + step / 2 * W(X + Y)
        if not torch.isfinite(Y).all():
            return Y, M
        Q, trusted = retract_cholesky(Y)
        return (Q if trusted else retract_qr(Y)), M
