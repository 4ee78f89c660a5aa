"""Singular values and vectors that survive LAPACK's failures to converge."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.errors import ConvergenceError
from hf_condlr.linalg.precision import at_least_float32, largest_entry, to_float64

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stub does not export it


def singular_values(S: Tensor) -> Tensor:  # (*, m, n) -> (*, min(m, n))
    """Singular values in descending order, in float64, relative to max|S| until the last step: no scale overflows."""
    scale = largest_entry(S)
    X = to_float64(S) / scale
    try:
        sigma = torch.linalg.svdvals(X)
    except LinAlgError:
        sigma = robust_svd(X)[1]
    return sigma * scale.squeeze(-1)


def condition_number(S: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    """κ(S) = σ_max/σ_min in float64; inf for a singular, NaN for a zero S."""
    sigma = singular_values(S)
    return sigma[..., 0] / sigma[..., -1]


def truncated_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:  # (m, n) -> (m, r), (r, r), (n, r)
    """The best rank-r approximation W ≈ U S Vᵀ in every unitarily invariant norm (Eckart–Young), S diagonal here."""
    P, sigma, Qh = robust_svd(at_least_float32(W))
    return P[:, :r].to(W.dtype), torch.diag(sigma[:r]).to(W.dtype), Qh[:r].mT.to(W.dtype)


def robust_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*, m, n) -> (*, m, k), (*, k), (*, k, n), k = min(m, n)
    """Reduced SVD X = P diag(σ) Qᵀ that survives LAPACK's failures to converge.

    Tries X as it is, then each matrix alone in float64: as it is, transposed, and turned by random rotations, each of
    which is a fresh problem with the same singular values.
    """
    try:
        P, sigma, Qh = torch.linalg.svd(at_least_float32(X), full_matrices=False)
        return P.to(X.dtype), sigma.to(X.dtype), Qh.to(X.dtype)
    except LinAlgError:
        flat = X.reshape(-1, *X.shape[-2:])
        triples = zip(*(_svd_of_one(to_float64(x)) for x in flat), strict=True)
        P, sigma, Qh = (torch.stack(parts).to(device=X.device, dtype=X.dtype) for parts in triples)
        batch = X.shape[:-2]
        return P.reshape(*batch, *P.shape[1:]), sigma.reshape(*batch, -1), Qh.reshape(*batch, *Qh.shape[1:])


def _svd_of_one(X: Tensor, attempts: int = 8) -> tuple[Tensor, Tensor, Tensor]:  # (m, n) float64
    if X.shape[0] < X.shape[1]:
        P, sigma, Qh = _svd_of_one(X.mT, attempts)
        return Qh.mT, sigma, P.mT
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    for attempt in range(attempts):
        try:
            if attempt == 0:
                return tuple(torch.linalg.svd(X, full_matrices=False))
            if attempt == 1:
                P, sigma, Qh = torch.linalg.svd(X.mT, full_matrices=False)
                return Qh.mT, sigma, P.mT
            Z = torch.linalg.qr(torch.randn(X.shape[1], X.shape[1], generator=generator, dtype=X.dtype)).Q.to(X.device)
            P, sigma, Qh = torch.linalg.svd(X @ Z, full_matrices=False)
            return P, sigma, Qh @ Z.mT
        except LinAlgError:
            continue
    raise ConvergenceError(
        "the singular value decomposition must converge",
        received=f"{attempts} failures on a {tuple(X.shape)} matrix with max|X| = {X.abs().max().item():.3g}",
        remedy="Check that the matrix is finite; the LAPACK behind torch may be broken.",
    )
