"""Singular values and vectors that survive LAPACK's failures: an error on a finite matrix, or NaN without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.errors import ConvergenceError, require
from hf_condlr.linalg.precision import at_least_float32, largest_entry, to_float64

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stub does not export it

SVD = tuple[Tensor, Tensor, Tensor]  # P (*, m, k), σ (*, k), Qᵀ (*, k, n) with k = min(m, n)


def singular_values(S: Tensor) -> Tensor:  # (*, m, n) -> (*, min(m, n))
    """Singular values in descending order, in float64, relative to max|S| until the last step: no scale overflows.

    Raises:
        ConvergenceError: S is not finite.
    """
    scale = largest_entry(S)
    X = to_float64(S) / scale
    try:
        sigma = torch.linalg.svdvals(X)
    except LinAlgError:
        sigma = torch.full_like(X[..., 0, :1], torch.nan)
    if not torch.isfinite(sigma).all():
        sigma = robust_svd(X)[1]
    return sigma * scale.squeeze(-1)


def singular_value_range(S: Tensor) -> tuple[Tensor, Tensor]:  # (*, m, n) -> (*,), (*,)
    """σ_max and σ_min in float64, to a relative 1e-9.

    From the eigenvalues of the Gram matrix, at half the cost of an SVD. Squaring makes the relative error of σ_min
    about k eps κ²; a stack in which that is too much gets the SVD.

    Raises:
        ConvergenceError: S is not finite.
    """
    scale, k = largest_entry(S), min(S.shape[-2:])
    X = to_float64(S) / scale
    X = X if S.shape[-2] >= S.shape[-1] else X.mT
    try:
        eigenvalues = torch.linalg.eigvalsh(X.mT @ X)
    except LinAlgError:
        eigenvalues = torch.full_like(X[..., 0, :], torch.nan)
    least, largest = eigenvalues[..., 0], eigenvalues[..., -1]
    if not (least * 1e-9 > 10 * k * torch.finfo(X.dtype).eps * largest).all():  # nor for NaN
        sigma = singular_values(S)
        return sigma[..., 0], sigma[..., -1]
    scale = scale.squeeze((-2, -1))
    return largest.sqrt() * scale, least.sqrt() * scale


def condition_number(S: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    """κ(S) = σ_max/σ_min in float64; inf for a singular S, NaN for S = 0.

    Raises:
        ConvergenceError: S is not finite.
    """
    sigma = singular_values(S)
    return sigma[..., 0] / sigma[..., -1]


def truncated_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:  # (m, n) -> (m, r), (r, r), (n, r)
    """The best rank-r approximation W ≈ U S Vᵀ in every unitarily invariant norm (Eckart–Young), with S diagonal.

    Raises:
        ConvergenceError: W is not finite.
    """
    P, sigma, Qh = robust_svd(at_least_float32(W))
    return P[:, :r].to(W.dtype), torch.diag(sigma[:r]).to(W.dtype), Qh[:r].mT.to(W.dtype)


def robust_svd(X: Tensor) -> SVD:  # (*, m, n)
    """Reduced SVD X = P diag(σ) Qᵀ of every finite X.

    Tries X as it is. Matrices of which that gives no finite result are decomposed one by one in float64: as they are,
    transposed, and turned by random rotations, each of which is a fresh problem with the same singular values.

    Returns:
        P (*, m, k), σ (*, k) in descending order, and Qᵀ (*, k, n), in the dtype of X, with k = min(m, n).

    Raises:
        ConvergenceError: X is not finite, or every attempt failed.
    """
    k = min(X.shape[-2:])
    wide = at_least_float32(X)
    try:
        P, sigma, Qh = torch.linalg.svd(wide, full_matrices=False)
    except LinAlgError:
        shapes = ((X.shape[-2], k), (k,), (k, X.shape[-1]))
        P, sigma, Qh = (wide.new_full((*X.shape[:-2], *shape), torch.nan) for shape in shapes)
    failed = ~(_finite(P) & _finite(sigma.unsqueeze(-1)) & _finite(Qh))
    if failed.any():
        results = zip(*(_svd_of_one(to_float64(x)) for x in X[failed]), strict=True)
        for part, repeated in zip((P, sigma, Qh), results, strict=True):
            part[failed] = torch.stack(repeated).to(part)
    return P.to(X.dtype), sigma.to(X.dtype), Qh.to(X.dtype)


def robust_eigh(G: Tensor, *, vectors: bool = True) -> tuple[Tensor, Tensor | None]:  # (n, n) -> (n,), (n, n)
    """Eigenvalues, ascending, and eigenvectors if wanted of a positive semidefinite G, symmetric up to rounding.

    From the SVD where LAPACK's eigh fails.

    Raises:
        ConvergenceError: G is not finite, or the SVD failed, too.
    """
    G = (G + G.mT) / 2
    try:
        values, Q = torch.linalg.eigh(G) if vectors else (torch.linalg.eigvalsh(G), None)
    except LinAlgError:
        values, Q = G.new_full(G.shape[:1], torch.nan), None
    if not _finite(values.unsqueeze(-1)) or (Q is not None and not _finite(Q)):
        Q, values, _ = robust_svd(G)
        values, Q = values.flip(0), Q.flip(1)
    return values, Q if vectors else None


def _svd_of_one(X: Tensor, attempts: int = 8) -> SVD:  # (m, n) float64
    if X.shape[0] < X.shape[1]:
        P, sigma, Qh = _svd_of_one(X.mT, attempts)
        return Qh.mT, sigma, P.mT
    require(
        _finite(X),
        "a matrix must be finite to have singular values",
        received=f"NaN or inf in a {tuple(X.shape)} matrix",
        remedy="Look for what made it so: a learning rate, a checkpoint, or calibration data.",
        error=ConvergenceError,
    )
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    for attempt in range(attempts):
        try:
            if attempt == 0:
                P, sigma, Qh = torch.linalg.svd(X, full_matrices=False)
            elif attempt == 1:
                Q, sigma, Ph = torch.linalg.svd(X.mT, full_matrices=False)
                P, Qh = Ph.mT, Q.mT
            else:
                Z = torch.randn(X.shape[1], X.shape[1], generator=generator, dtype=X.dtype)
                Z = torch.linalg.qr(Z).Q.to(X.device)
                P, sigma, Qh = torch.linalg.svd(X @ Z, full_matrices=False)
                Qh = Qh @ Z.mT
        except LinAlgError:
            continue
        if _finite(P) & _finite(sigma.unsqueeze(-1)) & _finite(Qh):
            return P, sigma, Qh
    raise ConvergenceError(
        "the singular value decomposition must converge",
        received=f"{attempts} failures on a {tuple(X.shape)} matrix with max|X| = {X.abs().max().item():.3g}",
        remedy="The matrix is finite: the LAPACK behind torch may be broken.",
    )


def _finite(X: Tensor) -> Tensor:  # (*, m, n) -> (*,) bool
    return torch.isfinite(X).all(-1).all(-1)
