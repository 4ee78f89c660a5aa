"""`ProjectedSGD`: SGD with momentum on the Stiefel manifold, by projection and QR retraction.

The classical scheme of Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_condlr.linalg import project_tangent, retract_qr
from studies.paper.baselines.stiefel import StiefelSGD


class ProjectedSGD(StiefelSGD):
    """SGD with momentum and orthonormal weights, by projected gradients and a QR retraction.

    With X (p, q), p ≥ q, XᵀX = I, the gradient G and the momentum M:

        M ← β M + (G − X sym(XᵀG))
        X ← Q of X − lr M = QR, diag(R) > 0

    The momentum is Euclidean: it is not moved from one tangent space to the next. What it holds outside of the present
    one, the retraction discards.

    Args:
        params: Parameters, or groups with `stiefel=True` for orthonormal weights, see `stiefel_groups`; the others
            get plain SGD with momentum.
        lr: Step size.
        momentum: β.
    """

    def __init__(self, params: Any, lr: float, *, momentum: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum)

    def stiefel_step(self, X: Tensor, G: Tensor, M: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The next weight and momentum, (p, q) each."""
        M = group["momentum"] * M + project_tangent(X, G)
        Y = X - group["lr"] * M
        return (retract_qr(Y) if bool(torch.isfinite(Y).all()) else Y), M
