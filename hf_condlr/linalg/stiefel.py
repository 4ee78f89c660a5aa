"""The Stiefel manifold {U: UᵀU = I}: projections on tangent spaces, and retractions.

Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, sections 3.5 and 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.linalg.precision import at_least_float32, per_matrix, to_float64
from hf_condlr.linalg.svd import robust_svd


def project_horizontal(
    U: Tensor, G: Tensor, product: Tensor | None = None
) -> Tensor:  # (*, m, r), (*, m, r), (*, r, r) -> (*, m, r)
    """(I − UUᵀ)G, the part of G that moves the span of U, without ever forming the m×m projector.

    Rotations of U within its span are dropped: S absorbs them.

    Args:
        U: Orthonormal bases, or some of their rows.
        G: Matrices to be projected, or the same rows of them.
        product: UᵀG of all rows, where it is known already.
    """
    U_, G_ = at_least_float32(U), at_least_float32(G)
    product = U_.mT @ G_ if product is None else product
    return (G_ - U_ @ product).to(G.dtype)


def project_tangent(
    U: Tensor, G: Tensor, product: Tensor | None = None
) -> Tensor:  # (*, m, r), (*, m, r), (*, r, r) -> (*, m, r)
    """G − U sym(UᵀG), the orthogonal projection on the tangent space of the Stiefel manifold at U.

    Args:
        U: Orthonormal bases, or some of their rows.
        G: Matrices to be projected, or the same rows of them.
        product: UᵀG of all rows, where it is known already.
    """
    U_, G_ = at_least_float32(U), at_least_float32(G)
    product = U_.mT @ G_ if product is None else product
    return (G_ - U_ @ ((product + product.mT) / 2)).to(G.dtype)


def orthonormality_error(U: Tensor) -> Tensor:  # (*, m, r) -> (*,)
    """‖UᵀU − I‖_F, in float64."""
    U = to_float64(U)
    return torch.linalg.matrix_norm(U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device))


def retract_cholesky(X: Tensor) -> tuple[Tensor, Tensor]:  # (*, m, r) -> (*, m, r), (*,) bool
    """X L⁻ᵀ with XᵀX = LLᵀ (Cholesky-QR): the same Q as `retract_qr`, from matrix products alone.

    Returns:
        The retracted matrices, and which of them are orthonormal to rounding, see `inverse_factor`.
    """
    X_ = at_least_float32(X)
    inverse, trusted = inverse_factor(X_.mT @ X_)
    return (X_ @ inverse.mT).to(X.dtype), trusted


def inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,) bool
    """L⁻¹ of XᵀX = LLᵀ, and whether X L⁻ᵀ is orthonormal to rounding.

    The error in orthonormality grows like eps κ(X)². κ(X)² ≤ ‖XᵀX‖_∞ ‖L⁻¹‖_1 ‖L⁻¹‖_∞ bounds it from small matrices;
    where that exceeds 32, or Cholesky breaks down, the result must not be used. For X = U + Δ with UᵀU = I and
    horizontal Δ, XᵀX = I + ΔᵀΔ: only a step of several times the size of U makes that so ill-conditioned.

    Nothing waits for the device.
    """
    info = torch.finfo(gram.dtype)
    inverse, exists = inverse_cholesky(gram)
    kappa_squared = _max_row_sum(gram) * _max_row_sum(inverse) * _max_row_sum(inverse.mT)
    # A NaN fails these comparisons, and so do squares that are no longer normal numbers.
    trusted = exists & (kappa_squared <= 32) & (_max_row_sum(gram) > info.tiny / info.eps)
    return inverse, trusted


def inverse_factor_near_identity(gram: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,) bool
    """`inverse_factor` to first order, and whether that is exact to rounding: for XᵀX = I + E with a small E.

    Let P be the lower triangle of E with half its diagonal, so that E = P + Pᵀ and ‖P‖_F² ≤ ‖E‖_F²/2. Then L⁻¹ ≈ I − P:
    (I − P)(I + E)(I − P)ᵀ = I − R with

        R = P² + PPᵀ + (P²)ᵀ − P²Pᵀ − P(P²)ᵀ,   ‖R‖_F ≤ 3 ‖P‖_F² + 2 ‖P‖_F³ ≤ 2 ‖E‖_F² for ‖E‖_F ≤ 1/2.

    R is how far X(I − P)ᵀ is from orthonormal, at most 8 eps where ‖E‖_F ≤ 2 √eps, 7e-4 in float32: steps of usual
    learning rates. It saves a Cholesky decomposition and a triangular inverse, which take as long as one or two of the
    six products with X.
    """
    r = gram.shape[-1]
    inverse = gram.tril().neg_()
    inverse.diagonal(dim1=-2, dim2=-1).add_(3).mul_(0.5)  # 1 − (g − 1)/2
    E = gram - torch.eye(r, dtype=gram.dtype, device=gram.device)
    return inverse, torch.linalg.vector_norm(E, dim=(-2, -1)) <= 2 * torch.finfo(gram.dtype).eps ** 0.5


def retract_qr(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r)
    """Q of the Householder decomposition X = QR with diag(R) > 0. Orthonormal for every finite X, singular ones too."""
    Q, R = torch.linalg.qr(_normalised(X))
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * sign.unsqueeze(-2)).to(X.dtype)


def retract_polar(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r)
    """X(XᵀX)^{-1/2}, the orthonormal matrix nearest to X; a second-order retraction.

    By QR and the SVD of the small triangular factor, so that nothing is squared and any X of full column rank is safe.
    """
    Q, R = torch.linalg.qr(_normalised(X))
    P, _, Zh = robust_svd(R)
    return (Q @ (P @ Zh)).to(X.dtype)


def inverse_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,) bool
    """L⁻¹ of G = LLᵀ, and whether it exists; the identity where it does not. Nothing waits for the device."""
    L, info = torch.linalg.cholesky_ex(G)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L = torch.where(per_matrix(info == 0), L, identity)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False), info == 0


def random_factors(
    m: int, n: int, r: int, rms: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random orthonormal U (m, r), V (n, r) and S = rms · Q with a random orthogonal Q (r, r): κ(S) = 1."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    U, V, Q = (retract_qr(torch.randn(k, r, dtype=wide, device=device)) for k in (m, n, r))
    return U.to(dtype), (rms * Q).to(dtype), V.to(dtype)


def _normalised(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r), at least float32
    """X/max|X|, of which Q and the polar factor are the same: no inner product overflows."""
    X = at_least_float32(X)
    scale = X.abs().amax(dim=(-2, -1), keepdim=True)
    return X / torch.where(scale > 0, scale, torch.ones_like(scale))


def _max_row_sum(A: Tensor) -> Tensor:  # (*, m, n) -> (*,)
    return A.abs().sum(-1).amax(-1)
