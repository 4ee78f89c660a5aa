"""A weight decomposed once in the metric of its data: the error of every rank, and the factors of any.

The metric is ‖F̃^{1/2} ΔW C^{1/2}‖_F² = tr(F̃ ΔW C ΔWᵀ), C (n, n) the second moments of the inputs, F̃ (m, m) those of
the gradients, damped. Neither root is computed, and C is never decomposed. With F̃ = L Lᵀ (Cholesky; the damping bounds
κ(F̃) by m + 1) a wide W needs the eigenvectors Q of the m×m matrix

    G = Lᵀ W C Wᵀ L = Q Σ² Qᵀ,   X = L⁻ᵀ Q,   Ŵ = X_r X_rᵀ F̃ W,

and a tall one, with WᵀF̃W = Tᵀ T, those of the n×n matrix

    G = T C Tᵀ = Q Σ² Qᵀ,        X = T⁻¹ Q,   Ŵ = W X_r X_rᵀ Wᵀ F̃ W.

σ_i are the singular values of F̃^{1/2} W C^{1/2}, and Ŵ is the best matrix of rank r (Eckart–Young), for a singular C,
too. Squaring leaves σ_i exact to 1e-8 σ_1 in float64; C itself comes from float32 sums, exact to 1e-7 σ_1².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_condlr.layers import Factors
from hf_condlr.linalg import robust_eigh, robust_svd
from hf_condlr.linalg.precision import to_float64

LEAST_PIVOT = 1e-5  # of T, relative to the largest: below it T comes from the eigenvectors of WᵀF̃W
NEGLIGIBLE = 1e-13  # eigenvalues of WᵀF̃W below this share of the largest are rounding


@dataclass
class Spectrum:
    """Result of `decompose`."""

    energy: Tensor  # (min(m, n),) float64 on the CPU: σ_i², descending; Σ_{i>r} σ_i² is the squared error of rank r
    X: Tensor | None  # (k, k), k = min(m, n), in the order of the energy; None if only the energy was asked for

    def factors(self, W: Tensor, r: int, F: Tensor | None) -> Factors:
        """The best W ≈ U S Vᵀ of rank r, S diagonal: U (m, r), S (r, r), V (n, r) in the dtype of W.

        Args:
            W: The weight (m, n) that was decomposed.
            r: The rank.
            F: The matrix (m, m) that it was decomposed with, or None.
        """
        assert self.X is not None
        wide, X = to_float64(W), to_float64(self.X[:, :r])
        m, n = W.shape
        left = X if m <= n else wide @ X
        right = left if F is None else damped_fisher(F) @ left
        Q_left, R_left = torch.linalg.qr(left)
        Q_right, R_right = torch.linalg.qr(wide.mT @ right)
        P, sigma, Zh = robust_svd(R_left @ R_right.mT)
        return (Q_left @ P).to(W), torch.diag(sigma).to(W), (Q_right @ Zh.mT).to(W)


def decompose(W: Tensor, C: Tensor, F: Tensor | None = None, *, vectors: bool = True) -> Spectrum:
    """Decompose a weight in the metric of its second moments, in float64.

    Args:
        W: The weight (m, n).
        C: Second moments (n, n) of its inputs.
        F: Second moments (m, m) of the gradients at its outputs, not yet damped; None for the identity.
        vectors: Whether factors are wanted, or the energy only.
    """
    wide, C = to_float64(W), to_float64(C)
    metric = None if F is None else damped_fisher(F)
    if W.shape[0] <= W.shape[1]:
        G = wide @ C @ wide.mT
        L = None if metric is None else torch.linalg.cholesky(metric)
        values, Q = robust_eigh(G if L is None else L.mT @ G @ L, vectors=vectors)
        X = Q if L is None or Q is None else torch.linalg.solve_triangular(L.mT, Q, upper=True)
    else:
        B = wide.mT @ (wide if metric is None else metric @ wide)
        T, info = torch.linalg.cholesky_ex(B, upper=True)
        pivots = T.diagonal()
        if info == 0 and pivots.min() > LEAST_PIVOT * pivots.max():
            values, Q = robust_eigh(T @ C @ T.mT, vectors=vectors)
            X = None if Q is None else torch.linalg.solve_triangular(T, Q, upper=True)
        else:
            values, X = _by_eigenvectors(B, C, vectors)
    energy = values.flip(0).clamp_min(0).cpu()
    if X is None:
        return Spectrum(energy, None)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return Spectrum(energy, X.flip(1).to(device=W.device, dtype=dtype))


def _by_eigenvectors(B: Tensor, C: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    """σ² ascending and X, where B = WᵀF̃W is too ill-conditioned for Cholesky: T = Λ^{1/2} Zᵀ with B = Z Λ Zᵀ."""
    values, Z = robust_eigh(B)
    assert Z is not None
    kept = values > NEGLIGIBLE * values[-1]
    root = torch.where(kept, values, 0).sqrt()
    T = root[:, None] * Z.mT
    sigma2, Q = robust_eigh(T @ C @ T.mT, vectors=vectors)
    if Q is None:
        return sigma2, None
    return sigma2, (Z / torch.where(kept, root, torch.inf)) @ Q


def damped_fisher(F: Tensor) -> Tensor:  # (m, m) -> (m, m) float64
    """F̃ = F + (tr F/m) I; the identity if there was no gradient.

    Few directions of the output usually have a gradient, and those without one must not be lost.
    """
    wide = to_float64(F)
    identity = torch.eye(len(F), dtype=torch.float64, device=wide.device)
    damping = wide.diagonal().mean()
    return wide + damping * identity if damping > 0 else identity


def activation_aware(W: Tensor, r: int, C: Tensor) -> Factors:
    """The rank-r Ŵ = U S Vᵀ nearest to W in the metric of its inputs: min ‖(W − Ŵ) C^{1/2}‖_F, C = E[x xᵀ] (n, n).

    With P the top r left singular vectors of W C^{1/2} the minimiser is Ŵ = P PᵀW, also for a singular C.
    """
    return decompose(W, C).factors(W, r, None)


def fisher(W: Tensor, r: int, C: Tensor, F: Tensor) -> Factors:
    """The rank-r Ŵ = U S Vᵀ that moves the predictions least: min ‖F̃^{1/2} (W − Ŵ) C^{1/2}‖_F, C (n, n), F (m, m).

    With P the top r left singular vectors of F̃^{1/2} W C^{1/2} the minimiser is Ŵ = F̃^{-1/2} P PᵀF̃^{1/2} W.

    Source: K-FAC (Martens and Grosse 2015) as the metric of a weighted SVD (Hsu et al. 2022, with a diagonal one).
    """
    return decompose(W, C, F).factors(W, r, F)
