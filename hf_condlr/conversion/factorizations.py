"""Factorizations that a layer can start from: a dense weight W (m, n) becomes factors U, S, V of rank r."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_condlr.layers import Factorization, Factors
from hf_condlr.linalg import random_factors, robust_svd, singular_values, truncated_svd
from hf_condlr.linalg.precision import at_least_float32, to_float64
from hf_condlr.linalg.svd import LinAlgError


def randomized_svd(W: Tensor, r: int, *, oversampling: int = 16, power_iterations: int = 4) -> Factors:
    """W ≈ U S Vᵀ from a random sketch of r + oversampling columns (Halko, Martinsson, Tropp 2011, algorithm 5.1).

    For layers so large that a full SVD is slow. Draws from torch's global random state.
    """
    q = min(r + oversampling, min(W.shape))
    U, sigma, V = torch.svd_lowrank(at_least_float32(W), q=q, niter=power_iterations)
    return U[:, :r].to(W.dtype), torch.diag(sigma[:r]).to(W.dtype), V[:, :r].to(W.dtype)


def orthogonal(W: Tensor, r: int) -> Factors:
    """Random orthonormal U, V and S = c Q, c = ‖W‖_F/√min(m, n): the rms singular value of the dense initialiser.

    For training from scratch: only the scale of W is used.
    """
    rms = W.float().norm().item() / math.sqrt(min(W.shape))
    return random_factors(W.shape[0], W.shape[1], r, rms, dtype=W.dtype, device=W.device)


def activation_aware(W: Tensor, r: int, C: Tensor) -> Factors:
    """The rank-r Ŵ = U S Vᵀ nearest to W in the metric of its inputs: min ‖(W − Ŵ) C^{1/2}‖_F, C = E[x xᵀ] (n, n).

    With P the top r left singular vectors of W C^{1/2} the minimiser is Ŵ = P PᵀW, also for a singular C; then
    PᵀW = S Vᵀ by SVD. Computed in float64, because C^{1/2} is usually ill-conditioned.
    """
    P, _, _ = robust_svd(whiten(W, C))
    P = P[:, :r]
    A, sigma, Vh = robust_svd(P.mT @ W.to(P))
    return P.to(W), (A * sigma).to(W), Vh.mT.to(W)


def fisher(W: Tensor, r: int, C: Tensor, F: Tensor) -> Factors:
    """The rank-r Ŵ = U S Vᵀ that moves the predictions least: min ‖F̃^{1/2} (W − Ŵ) C^{1/2}‖_F, C (n, n), F (m, m).

    F = E[Σ g gᵀ] of the gradients at the layer's output; F̃ = F + (tr F/m) I, since usually few directions of the output
    have a gradient, and those without one must not be lost. With P the top r left singular vectors of
    F̃^{1/2} W C^{1/2} the minimiser is Ŵ = F̃^{-1/2} P PᵀF̃^{1/2} W, also for a singular C. Computed in float64.

    Source: K-FAC (Martens and Grosse 2015) as the metric of a weighted SVD (Hsu et al. 2022, with a diagonal one).
    """
    root = fisher_root(F)
    P, _, _ = robust_svd(root @ whiten(W, C))
    P = P[:, :r]
    left, R = torch.linalg.qr(torch.linalg.solve(root, P))
    A, sigma, Vh = robust_svd(R @ P.mT @ root @ W.to(root))
    return (left @ A).to(W), torch.diag(sigma).to(W), Vh.mT.to(W)


def fisher_root(F: Tensor) -> Tensor:  # (m, m) -> (m, m) float64
    """F̃^{1/2}."""
    eigenvalues, Q = _eigh(damped_fisher(F))
    return (Q * eigenvalues.sqrt()) @ Q.mT


def damped_fisher(F: Tensor) -> Tensor:  # (m, m) -> (m, m) float64
    """F̃ = F + (tr F/m) I; the identity if there was no gradient."""
    wide = to_float64(F)
    identity = torch.eye(len(F), dtype=torch.float64, device=wide.device)
    damping = wide.diagonal().mean()
    return wide + damping * identity if damping > 0 else identity


def whiten(W: Tensor, C: Tensor) -> Tensor:  # (m, n), (n, n) -> (m, n) float64
    """W C^{1/2} in the eigenbasis of C, that is W Q Λ^{1/2}: its singular values and left vectors are the same."""
    eigenvalues, Q = _eigh(to_float64(C))
    return (to_float64(W) @ Q) * eigenvalues.sqrt()


def _eigh(C: Tensor) -> tuple[Tensor, Tensor]:  # (n, n) -> (n,), (n, n)
    """Eigenvalues and eigenvectors of a positive semidefinite C: where LAPACK's eigh fails, from its SVD."""
    try:
        eigenvalues, Q = torch.linalg.eigh(C)
    except LinAlgError:
        eigenvalues, Q = C.new_full(C.shape[:1], math.nan), C
    if not (torch.isfinite(eigenvalues).all() and torch.isfinite(Q).all()):
        Q, eigenvalues, _ = robust_svd(C)
    return eigenvalues.clamp_min(0), Q


FACTORIZATIONS: dict[str, Factorization] = {
    "svd": truncated_svd,
    "randomized_svd": randomized_svd,
    "orthogonal": orthogonal,
}


def spectral_energy(W: Tensor) -> Tensor:  # (m, n) -> (min(m, n),) float64, on the CPU
    """σ_i² in descending order, from the smaller Gram matrix: a fraction of the cost of the SVD of W."""
    wide = to_float64(W)
    return singular_values(wide @ wide.mT if W.shape[0] <= W.shape[1] else wide.mT @ wide).cpu()


def truncation_error(W: Tensor, U: Tensor, S: Tensor, V: Tensor, C: Tensor | None = None) -> float:
    """‖(W − U S Vᵀ) C^{1/2}‖_F / ‖W C^{1/2}‖_F, C = I where it is None; 0 for W = 0."""
    W, U, S, V = (at_least_float32(X) if C is None else to_float64(X) for X in (W, U, S, V))
    difference = W - U @ S @ V.mT
    if C is not None:
        W, difference = whiten(torch.cat([W, difference]), C).chunk(2)
    norm = W.norm()
    return (difference.norm() / norm).item() if norm > 0 else 0.0


def optimal_truncation_error(W: Tensor, r: int) -> float:
    """√(Σ_{i>r} σ_i²) / ‖W‖_F, the least error of a matrix of rank r (Eckart–Young)."""
    energy = spectral_energy(W)
    return (energy[r:].sum() / energy.sum()).sqrt().nan_to_num().item()
