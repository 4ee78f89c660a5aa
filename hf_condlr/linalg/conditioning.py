"""Conditioning: the singular values of a core S, and their clip to κ(S) ≤ 1 + τ."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hf_condlr.errors import ConditioningError, ConfigError
from hf_condlr.linalg.precision import (
    at_least_float32,
    full_precision,
    largest_entry,
    per_matrix,
    to_float64,
    wide_device,
)
from hf_condlr.linalg.svd import LinAlgError, robust_svd

Center = Literal["nearest", "rms", "mean"]

CENTERS: tuple[Center, ...] = get_args(Center)


ROUNDING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""Relative excess of κ(S) over 1 + τ that rounding S to its dtype can cause, with a margin; S counts as feasible."""


@full_precision()  # under autocast or TF32 the float32 products below would prove nothing
def clamp_singular_values(S: Tensor, tau: float | Tensor, *, center: Center = "nearest") -> Tensor:  # (*, r, r)
    """Clip the singular values of S = P diag(σ) Qᵀ to an interval [a, (1+τ)a], so that κ(S) ≤ 1 + τ.

    A feasible S comes back bitwise. For the others `center` chooses the interval:

    - `nearest`: the Euclidean projection, a = argmin Σ dist(σ_i, [a, (1+τ)a])²;
    - `rms`: [c − e, c + e] with c = ‖S‖_F/√r and e = cτ/(2+τ), so that (c+e)/(c−e) = 1 + τ;
    - `mean`: the same around the mean of σ, as in the paper's experiments.

    Only `nearest` is a projection. τ = 0 gives a multiple of the polar factor, τ = inf returns S.

    Args:
        S: Square cores `(*, r, r)`.
        tau: Conditioning tolerance τ ≥ 0, a number or one per core `(*,)`.
        center: The interval.

    Returns:
        Cores with κ ≤ 1 + τ after rounding to their dtype: the interval is narrowed by the effect of rounding, a
        relative 2 eps (1+τ). Only where that would require κ < 1 (τ of the order of eps) an excess remains, at most
        `ROUNDING_TOLERANCE`, in half precision eps.

    Raises:
        ConditioningError: A core is zero or not finite.

    Three ways, the cheapest first that can tell: `surely_feasible`; for float32 cores of a small κ the spectrum of the
    Gram matrix in float32, see `_clamp_in_float32`; that of the Gram matrix in float64, which squares κ, and an SVD
    where it is not accurate enough. (float32 `svd` is unusable here: after clipping many σ coincide, and LAPACK's gesdd
    then sometimes fails.)
    """
    if center not in CENTERS:
        raise ConfigError("center must be one of nearest, rms, mean", received=repr(center), remedy="Choose one.")
    cores = S.reshape(-1, *S.shape[-2:])
    tau_ = torch.as_tensor(tau, dtype=torch.float64).to(wide_device(S)).expand(S.shape[:-2]).reshape(-1)
    if not bool((tau_ >= 0).all()):
        raise ConfigError("tau must be ≥ 0", received=tau_.min().item(), remedy="tau = 0 asks for κ(S) = 1.")
    refused = (~is_conditionable(cores)).nonzero()
    if len(refused):
        index = int(refused[0, 0])
        raise ConditioningError(
            "a core S must be finite and not zero to be conditioned",
            received=f"max|S| = {cores[index].abs().max().item():.3g} in core {index} of the stack",
            remedy="Lower the learning rate or the weight decay of S, or reinitialise the layer.",
        )
    scale = torch.exp2(torch.frexp(largest_entry(cores)).exponent.double())  # a power of 2, so that nothing is rounded
    bound, result = 1 + tau_, cores.clone()
    X = (cores.to(at_least_float32(cores).dtype) / scale.to(cores.device)).to(at_least_float32(cores).dtype)
    gram = X.mT @ X
    rest = (~(torch.isinf(bound) | surely_feasible(gram, bound.to(gram)).to(bound.device))).nonzero().flatten()
    if len(rest) and cores.dtype == torch.float32:
        clamped, feasible, decided = _clamp_in_float32(X[rest], gram[rest], bound[rest], center)
        moved = decided & ~feasible
        result[rest[moved]] = (clamped[moved] * scale[rest[moved]]).to(result)
        rest = rest[~decided]
    if len(rest):
        clamped, feasible = _clamp(to_float64(cores[rest]) / scale[rest], bound[rest], center, S.dtype)
        result[rest[~feasible]] = (clamped * scale[rest])[~feasible].to(result)
    return result.reshape(S.shape)


def surely_feasible(gram: Tensor, bound: Tensor) -> Tensor:  # (b, r, r), (b,) -> (b,) bool
    """Whether G = SᵀS proves κ(S) ≤ β without a decomposition; says nothing where it is False.

    With c² = ‖S‖_F²/r = tr(G)/r and δ = ‖G/c² − I‖_F all σ² lie in [(1 − δ)c², (1 + δ)c²], so κ² ≤ (1 + δ)/(1 − δ), at
    most β² where δ ≤ (β² − 1)/(β² + 1). Rounding of G, computed in any order, adds at most r u ‖S‖_F² = r² u c² to
    ‖G − c² I‖_F, u = eps/2, and that of the trace and of δ a few u r: r (r + 8) u is left for it.
    """
    r = gram.shape[-1]
    c_squared = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    deviation = gram / per_matrix(c_squared)
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    rounding = r * (r + 8) * torch.finfo(gram.dtype).eps / 2
    squared = bound.square()
    return torch.linalg.vector_norm(deviation, dim=(-2, -1)) + rounding <= (squared - 1) / (squared + 1)


def is_conditionable(S: Tensor) -> Tensor:  # (*, r, r) -> (*,) bool
    """Whether S is finite, not zero, and of a scale at which its dtype still resolves relative differences."""
    info = torch.finfo(S.dtype)
    # Subnormal numbers may be flushed to zero; float16, which has little else, keeps them.
    least = 16 * info.tiny if S.dtype == torch.float16 else info.tiny / info.eps
    largest = S.abs().amax(dim=(-2, -1))
    return torch.isfinite(largest) & (largest >= least) & (largest <= info.max / (4 * S.shape[-1]))


def _clamp_in_float32(X: Tensor, gram: Tensor, bound: Tensor, center: Center) -> tuple[Tensor, Tensor, Tensor]:
    """Clip float32 cores (b, r, r) with max|X| about 1 to κ ≤ bound (b,): X + X Q diag(clipped/σ − 1) Qᵀ.

    Half the time of float64. The eigenvectors only carry the change, so that their rounding counts little. What κ is
    off by was at most 2 √r eps in cores of κ ≤ 2, eigenvalues that coincide included; 3 √r eps κ² is allowed for it. A
    κ nearer to the bound than that is not decided here, nor is what it makes inaccurate, as for large κ, or τ = 0. The
    interval is narrowed by three times as much, so that the result is feasible when it is looked at again.

    Returns the clipped cores, which were feasible as given, and for which both is decided.
    """
    r, eps = X.shape[-1], torch.finfo(X.dtype).eps
    try:
        eigenvalues, Q = torch.linalg.eigh(gram)
    except LinAlgError:
        return X, torch.zeros_like(bound, dtype=torch.bool), torch.zeros_like(bound, dtype=torch.bool)
    sigma = eigenvalues.to(bound).clamp_min(eps).sqrt()
    kappa = sigma[:, -1] / sigma[:, 0]
    error = 3 * r**0.5 * eps * kappa.square()
    narrowed = bound * (1 - 3 * error)
    feasible = kappa <= bound * (1 - error)
    decided = (error <= 1e-5) & (narrowed >= 1) & (feasible | (kappa > bound * (1 + error)))  # False for NaN
    low, high = clipping_interval(sigma, narrowed.clamp_min(1), center)
    change = torch.minimum(torch.maximum(sigma, low.unsqueeze(-1)), high.unsqueeze(-1)) / sigma - 1
    columns = (change != 0).any(0).nonzero().flatten()  # those at the ends of the spectra
    Q, change = Q[..., columns], change[:, columns].to(X)
    return X + (X @ Q * change.unsqueeze(-2)) @ Q.mT, feasible, decided


def _clamp(X: Tensor, bound: Tensor, center: Center, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Clip float64 cores (b, r, r) with max|X| = 1 to κ ≤ bound (b,), to be rounded to `dtype`.

    Returns the clipped cores, and which were feasible as given.
    """
    r = X.shape[-1]
    tolerance = ROUNDING_TOLERANCE.get(dtype, 1e-6)
    try:
        eigenvalues, Q = torch.linalg.eigh(X.mT @ X)
        # Squaring makes the relative error of σ_min about r eps κ²: trusted where that stays below the tolerance.
        accurate = eigenvalues[:, 0] * tolerance > 10 * r * torch.finfo(X.dtype).eps * eigenvalues[:, -1]
        accurate = accurate & torch.isfinite(Q).all(-1).all(-1)
    except LinAlgError:
        eigenvalues, Q = X.new_ones(X.shape[:-1]), X
        accurate = torch.zeros(len(X), dtype=torch.bool, device=X.device)
    sigma = eigenvalues.clamp_min(torch.finfo(X.dtype).tiny).sqrt()
    left = (X @ Q) / sigma.unsqueeze(-2)
    if not accurate.all():
        rest = ~accurate
        P_, sigma_, Zh = robust_svd(X[rest])
        left, sigma, Q = left.clone(), sigma.clone(), Q.clone()
        left[rest], sigma[rest], Q[rest] = P_.flip(-1), sigma_.flip(-1), Zh.mT.flip(-1)  # ascending, as eigh's
    unbounded = torch.isinf(bound)
    feasible = (sigma[:, -1] <= bound * (1 + tolerance) * sigma[:, 0]) | unbounded
    bound = torch.where(unbounded, torch.ones_like(bound), bound)
    # Rounding moves every σ by up to about 0.6 eps σ_max, so κ by a relative 0.6 eps (1 + κ).
    low, high = clipping_interval(sigma, (bound / (1 + 2 * torch.finfo(dtype).eps * bound)).clamp_min(1), center)
    clipped = torch.minimum(torch.maximum(sigma, low.unsqueeze(-1)), high.unsqueeze(-1))
    return (left * clipped.unsqueeze(-2)) @ Q.mT, feasible


def clipping_interval(sigma: Tensor, bound: Tensor, center: Center) -> tuple[Tensor, Tensor]:  # (b, r), (b,) -> (b,)
    """The interval [a, bound·a] for singular values in ascending order, bound = 1 + τ finite."""
    if center == "nearest":
        low = _nearest_low(sigma, bound)
    else:
        middle = sigma.square().mean(-1).sqrt() if center == "rms" else sigma.mean(-1)
        low = 2 * middle / (1 + bound)  # c − e with e = cτ/(2+τ)
    return low, low * bound


def _nearest_low(sigma: Tensor, bound: Tensor) -> Tensor:  # (b, r) ascending, (b,) -> (b,)
    """argmin over a of Σ_{σ<a} (a − σ)² + Σ_{σ>βa} (σ − βa)², β = bound.

    Half the derivative, h(a) = Σ_{σ<a} (a − σ) − β Σ_{σ>βa} (σ − βa), is continuous, increasing and linear between the
    breakpoints σ_i and σ_i/β. The root lies between the last breakpoint with h ≤ 0 and the next; the index sets are
    constant there and are read in the middle, where no rounding of β · (σ_i/β) can turn an equality around.
    """
    r = sigma.shape[-1]
    beta = bound.unsqueeze(-1)
    breakpoints = torch.cat((sigma, sigma / beta), dim=-1).sort(-1).values  # (b, 2r)
    cumulative = torch.nn.functional.pad(sigma.cumsum(-1), (1, 0))  # (b, r + 1): sum of the i smallest

    def sets(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count and sum of σ ≤ a, and of σ > βa."""
        below = torch.searchsorted(sigma, a.contiguous(), right=True)
        upto = torch.searchsorted(sigma, (beta * a).contiguous(), right=True)
        return below, cumulative.gather(-1, below), r - upto, cumulative[..., -1:] - cumulative.gather(-1, upto)

    n_low, sum_low, n_high, sum_high = sets(breakpoints)
    h = n_low * breakpoints - sum_low - beta * (sum_high - n_high * beta * breakpoints)
    last = ((h <= 0).sum(-1, keepdim=True) - 1).clamp_min(0)
    left, right = (breakpoints.gather(-1, i) for i in (last, (last + 1).clamp_max(2 * r - 1)))
    n_low, sum_low, n_high, sum_high = sets((left + right) / 2)
    root = (sum_low + beta * sum_high) / (n_low + beta.square() * n_high).clamp_min(1)
    return torch.minimum(torch.maximum(root, left), right).squeeze(-1)
