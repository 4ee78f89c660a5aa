"""The Stiefel manifold {U: UᵀU = I}: projections on tangent spaces, and retractions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.linalg.precision import at_least_float32, largest_entry, per_matrix, to_float64
from hf_condlr.linalg.svd import robust_svd


def project_horizontal(U: Tensor, G: Tensor) -> Tensor:  # (*, m, r), (*, m, r) -> (*, m, r)
    """(I − UUᵀ)G, without ever forming the m×m projector.

    The part of G that moves the span of U. U's rotations within its span are dropped: S absorbs them.
    """
    U_, G_ = at_least_float32(U), at_least_float32(G)
    return (G_ - U_ @ (U_.mT @ G_)).to(G.dtype)


def project_tangent(U: Tensor, G: Tensor) -> Tensor:  # (*, m, r), (*, m, r) -> (*, m, r)
    """G − U sym(UᵀG), the orthogonal projection on the tangent space of the Stiefel manifold at U."""
    U_, G_ = at_least_float32(U), at_least_float32(G)
    A = U_.mT @ G_
    return (G_ - U_ @ ((A + A.mT) / 2)).to(G.dtype)


def orthonormality_error(U: Tensor) -> Tensor:  # (*, m, r) -> (*,)
    """‖UᵀU − I‖_F, in float64."""
    U = to_float64(U)
    return torch.linalg.matrix_norm(U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device))


def retract_qr(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r)
    """Q of the Householder decomposition X = QR with diag(R) > 0. Orthonormal for every finite X, singular ones too."""
    Q, R = torch.linalg.qr(_normalised(X))
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * sign.unsqueeze(-2)).to(X.dtype)


def retract_cholesky(X: Tensor, *, fallback: bool = True) -> Tensor:  # (*, m, r) -> (*, m, r)
    """X L⁻ᵀ with XᵀX = LLᵀ (Cholesky-QR): the same Q as `retract_qr`, from matrix products.

    The error in orthonormality grows like eps κ(X)². κ(X)² ≤ ‖XᵀX‖_∞ ‖L⁻¹‖_1 ‖L⁻¹‖_∞ certifies it from small matrices;
    where that is above 32, or Cholesky breaks down, Householder QR takes over. For X = U + Δ with UᵀU = I and
    horizontal Δ, XᵀX = I + ΔᵀΔ: that takes a step of several times the size of U. To see whether it happened the host
    waits for the device; with `fallback=False` it does not, and such matrices become NaN.
    """
    X_ = at_least_float32(X)
    inverse, trusted = trusted_inverse_cholesky(X_.mT @ X_)
    Q = X_ @ inverse.mT
    if not fallback:
        Q = torch.where(per_matrix(trusted), Q, torch.nan)
    elif not trusted.all():
        Q[~trusted] = retract_qr(X_[~trusted])
    return Q.to(X.dtype)


def trusted_inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,) bool
    """L⁻¹ of XᵀX = LLᵀ, and whether X L⁻ᵀ is orthonormal enough, see `retract_cholesky`."""
    eps = torch.finfo(gram.dtype).eps
    inverse, exists = inverse_cholesky(gram)
    kappa_squared = _max_row_sum(gram) * _max_row_sum(inverse) * _max_row_sum(inverse.mT)
    # A NaN is not trusted, nor squares that are no longer normal numbers.
    return inverse, exists & (kappa_squared <= 32) & (_max_row_sum(gram) > torch.finfo(gram.dtype).tiny / eps)


def scaled_qr(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*, m, r) -> (*, m, k), (*, r, r), (*, 1, 1)
    """X = scale · Q R, k = min(m, r), with zeros below R's k rows; of any finite X, also one of no rows."""
    m, r = X.shape[-2:]
    scale = largest_entry(X).to(X.dtype) if m else X.new_ones(*X.shape[:-2], 1, 1)
    Q, R = torch.linalg.qr(X / scale)
    return Q, torch.nn.functional.pad(R, (0, 0, 0, r - R.shape[-2])), scale


def joined_qr(
    R: Tensor, scale: Tensor, heights: list[int]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:  # (N, *, r, r), (N, *, 1, 1), N × k_j
    """One QR of N blocks of rows X_j = scale_j · Q_j R_j, by their small factors, of which the first k_j rows count.

    Returns:
        Blocks B_j, (*, k_j, r), so that Q_j B_j are the rows of Q; R of the whole, diag(R) ≥ 0; and its scale.
    """
    largest = scale.amax(0)
    # Without the rows that pad: where X is singular, Q would lie in them.
    stacked = torch.cat([R[j][..., :k, :] * (scale[j] / largest) for j, k in enumerate(heights)], dim=-2)
    Q, joined = torch.linalg.qr(stacked)
    sign = torch.where(joined.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * sign.unsqueeze(-2)).split(heights, dim=-2), joined * sign.unsqueeze(-1), largest


def inverse_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,) bool
    """L⁻¹ of G = LLᵀ, and whether it exists, without a wait for the device; the identity where it does not."""
    L, info = torch.linalg.cholesky_ex(G)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L = torch.where(per_matrix(info == 0), L, identity)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False), info == 0


def _normalised(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r), at least float32
    """X/max|X|, of which Q and the polar factor are the same: no inner product overflows."""
    X = at_least_float32(X)
    scale = X.abs().amax(dim=(-2, -1), keepdim=True)
    return X / torch.where(scale > 0, scale, torch.ones_like(scale))


def _max_row_sum(A: Tensor) -> Tensor:  # (*, m, n) -> (*,)
    return A.abs().sum(-1).amax(-1)


def retract_polar(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r)
    """X(XᵀX)^{-1/2}, the orthonormal matrix nearest to X; a second-order retraction.

    By QR and the SVD of the small triangular factor, so that nothing is squared and any X of full column rank is safe.
    """
    Q, R = torch.linalg.qr(_normalised(X))
    P, _, Zh = robust_svd(R)
    return (Q @ (P @ Zh)).to(X.dtype)


def orthonormalize(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*, m, r), (*, r, r), (*, n, r)
    """Orthonormal factors of the same W: U = Q_U R_U, V = Q_V R_V, W = Q_U (R_U S R_Vᵀ) Q_Vᵀ. Nothing is lost."""
    Q_U, R_U = torch.linalg.qr(at_least_float32(U))
    Q_V, R_V = torch.linalg.qr(at_least_float32(V))
    core = R_U @ at_least_float32(S) @ R_V.mT
    return Q_U.to(U.dtype), core.to(S.dtype), Q_V.to(V.dtype)


def random_factors(
    m: int, n: int, r: int, rms: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random orthonormal U (m, r), V (n, r) and S = rms · Q with a random orthogonal Q (r, r): κ(S) = 1."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    U, V, Q = (retract_qr(torch.randn(k, r, dtype=wide, device=device)) for k in (m, n, r))
    return U.to(dtype), (rms * Q).to(dtype), V.to(dtype)
