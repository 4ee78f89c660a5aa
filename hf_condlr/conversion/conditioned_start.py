"""The best factors that obey the bound, which the option `conditioned_start` starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.conversion.spectra import damped_fisher
from hf_condlr.layers import Factors
from hf_condlr.linalg import Center, clamp_singular_values, condition_number, retract_polar, singular_values
from hf_condlr.linalg.precision import at_least_float32

MAX_SWEEPS = 100
CORE_STEPS = 5  # projected gradient steps of S in a sweep; they multiply r×r matrices only, which costs little
LEAST_GAIN = 1e-3  # stop when ten sweeps lower the error by a smaller share than this


def nearest_conditioned(
    W: Tensor, factors: Factors, tau: float, *, center: Center = "nearest", C: Tensor | None, F: Tensor | None
) -> Factors:
    """Factors with κ(S) ≤ 1 + τ that minimise f = ‖F̃^{1/2} (W − U S Vᵀ) C^{1/2}‖_F², from the clipped S on.

    Clipping alone moves the singular values of a start that is aware of data as if all directions counted equally. Here
    S takes projected gradient steps, and U and V each go to the polar factor of U − ∇_U f/L, L the Lipschitz
    constant of ∇f: the minimiser over orthonormal matrices of a quadratic that lies above f (a majorisation), so f
    falls in every sweep. With M = UᵀF̃U and N = VᵀCV the gradients are

        ∇_S f = M S N − UᵀF̃WCV,  ∇_U f = F̃U S N Sᵀ − F̃WCV Sᵀ,  ∇_V f = CV SᵀM S − C WᵀF̃U S  (each times 2).

    Without C and F the clipped S is the optimum already (von Neumann's trace inequality), with the interval `nearest`.

    Args:
        W: The dense weight (m, n).
        factors: U (m, r), S (r, r), V (n, r) of the start; returned unchanged if they obey the bound.
        tau: κ(S) ≤ 1 + tau.
        center: The interval of the clipping.
        C: Second moments (n, n) of the inputs; None for the identity.
        F: Second moments (m, m) of the outputs' gradients, damped as in `fisher`; None for the identity.
    """
    U, S, V = map(at_least_float32, factors)
    if condition_number(S) <= 1 + tau:
        return factors
    S = clamp_singular_values(S, tau, center=center)
    if C is None and F is None:
        return U.to(W), S.to(W), V.to(W)
    wide = W.to(S)
    left = _metric(None if F is None else damped_fisher(F), len(wide), S)
    right = _metric(C, wide.shape[1], S)
    target = left @ wide @ right  # F̃WC
    largest_left, largest_right = _largest(left), _largest(right)
    norm = (target * wide).sum()  # ‖F̃^{1/2} W C^{1/2}‖_F²
    errors: list[float] = []
    best = U, S, V
    left_U, right_V, cross = left @ U, right @ V, target @ V
    for _ in range(MAX_SWEEPS):
        M, N, R = U.mT @ left_U, V.mT @ right_V, U.mT @ cross
        errors.append((((M @ S @ N - 2 * R) * S).sum() / norm).item())  # f/‖·‖² − 1
        if not errors[-1] <= min(errors):  # converged to rounding, or NaN, which compares false
            U, S, V = best
            break
        best = U, S, V
        if len(errors) > 10 and errors[-11] - errors[-1] < LEAST_GAIN * (1 + errors[-1]):
            break
        L = _largest(M) * _largest(N)
        for _ in range(CORE_STEPS):
            S = clamp_singular_values(S - (M @ S @ N - R) / L, tau, center=center)
        K = S @ N @ S.mT
        U = retract_polar(U - (left_U @ K - cross @ S.mT) / (largest_left * _largest(K)))
        left_U = left @ U
        K = S.mT @ (U.mT @ left_U) @ S
        V = retract_polar(V - (right_V @ K - target.mT @ U @ S) / (largest_right * _largest(K)))
        right_V, cross = right @ V, target @ V
    return U.to(W), clamp_singular_values(S, tau, center=center).to(W), V.to(W)


def _metric(matrix: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The matrix scaled to mean eigenvalue 1: products of squared small gradients would underflow."""
    if matrix is None or not matrix.any():
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return (matrix / matrix.diagonal().mean()).to(like)


def _largest(X: Tensor) -> Tensor:
    """λ_max of a positive semidefinite matrix."""
    return singular_values(X)[0].to(X)
