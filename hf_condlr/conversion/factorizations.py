"""Factorizations that a layer can start from: a dense weight W (m, n) becomes factors U, S, V of rank r."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_condlr.layers import Factorization, Factors
from hf_condlr.linalg import random_factors, singular_values, truncated_svd
from hf_condlr.linalg.precision import at_least_float32, to_float64


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
    if C is None:
        error, norm = difference.norm(), W.norm()
    else:
        error, norm = (((X @ to_float64(C)) * X).sum().clamp_min(0).sqrt() for X in (difference, W))
    return (error / norm).item() if norm > 0 else 0.0


def optimal_truncation_error(W: Tensor, r: int) -> float:
    """√(Σ_{i>r} σ_i²) / ‖W‖_F, the least error of a matrix of rank r (Eckart–Young)."""
    energy = spectral_energy(W)
    return (energy[r:].sum() / energy.sum()).sqrt().nan_to_num().item()
