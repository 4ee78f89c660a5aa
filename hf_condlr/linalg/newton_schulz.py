"""Conditioning by matrix products alone, for GPUs, where an eigendecomposition would make the host wait.

Every function takes float64 stacks (b, r, r), computes a fixed number of products and reads nothing back. Sources:
Kovarik 1970 and Chen & Chow, *A stable scaling of Newton–Schulz*, 2014 (polar factor); Higham, *Functions of Matrices*,
2008, chapters 5 and 8 (sign function, |X| = X sign(X)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.linalg.conditioning import Center
from hf_condlr.linalg.precision import per_matrix
from hf_condlr.linalg.stiefel import inverse_cholesky

LARGEST_CONDITION = 1e6
"""Cores of a larger κ are not clipped. The number of iterations follows from it."""

LARGEST_BOUND = 1e4
"""Bounds above this are not for this module: Gram matrices square κ, so that float64 could not certify them."""

ESTIMATE_TOLERANCE = 1e-5
"""Relative excess of κ over its bound that the error of `extreme_singular_values` alone can produce."""

CERTIFICATE_TOLERANCE = 2e-5
"""The certificate states κ ≤ bound (1 + this)."""

_SQUARINGS = 20
_NEWTON_STEPS = 2
_EXACT, _NEARLY = 1e-15, 1e-7  # how far singular values may end from 1
_COARSE, _FINE = 1e-3, 1e-8  # eigenvalues below this share of the norm have no accurate sign


def clip_by_products(S: Tensor, bound: Tensor, center: Center, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Clip the singular values of S = O H, O orthogonal, H symmetric positive: S' = O clip(H; a, βa).

    clip(H; a, b) = ½((a + b) I + |H − aI| − |H − bI|), |X| = X sign(X), O and sign(X) by Newton–Schulz. `nearest`
    solves h(a) = Σ_{σ<a} (a − σ) − β Σ_{σ>βa} (σ − βa) = 0 by two Newton steps between σ_min and σ_max/β; the sums are
    traces of sign functions. The resulting a is close to the minimiser; the bound holds for every a.

    Args:
        S: Finite cores (b, r, r), float64, max|S| = 1.
        bound: β = 1 + τ of each core, (b,), finite.
        center: The interval, as in `clamp_singular_values`.
        margin: β is divided by 1 + margin · β, to leave room for rounding S' to another dtype.

    Returns:
        S'; which cores were feasible as given, and are returned unchanged; and which are feasible or certified to have
        κ(S') ≤ β (1 + `CERTIFICATE_TOLERANCE`) by two Cholesky decompositions.
    """
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    largest, smallest = extreme_singular_values(S)
    feasible = largest <= bound * (1 + ESTIMATE_TOLERANCE) * smallest
    S_ = S / per_matrix(largest)
    polar = newton_schulz(
        S_, (smallest / largest).clamp(1 / LARGEST_CONDITION, 1), _iterations(1 / LARGEST_CONDITION, _EXACT)
    )
    H = polar.mT @ S_
    H = (H + H.mT) / 2
    narrowed = (bound / (1 + margin * bound)).clamp_min(1)
    low = _interval_low(H, smallest / largest, narrowed, center)
    ends = torch.stack((low, low * narrowed))
    X = H - per_matrix(ends) * identity  # (2, b, r, r)
    below, above = X @ _sign(X, ends, smallest / largest, _FINE, _NEARLY)
    clipped = ((per_matrix(ends.sum(0)) * identity) + below - above) / 2
    clipped = (clipped + clipped.mT) / 2
    result = polar @ clipped
    slack = 1 + CERTIFICATE_TOLERANCE / 2
    certified = _within(result, low / slack, low * bound * slack)
    result = torch.where(per_matrix(feasible), S, result * per_matrix(largest))
    return result, feasible, certified | feasible


def clip_core_by_products(S: Tensor, bound: Tensor, center: Center, start: Tensor) -> tuple[Tensor, Tensor]:
    """Condition cores (b, r, r) that are finite and not zero to κ ≤ `bound`, (b,), in their own dtype.

    A core of κ > `LARGEST_CONDITION` / √r, which no step of training makes from a well-conditioned `start`, is replaced
    by its `start`, conditioned. A core whose clip is not certified (no such core is known) is replaced by its `start`,
    which obeys the bound of the previous step.

    Args:
        S: Cores (b, r, r).
        bound: β = 1 + τ of each core, (b,), at most `LARGEST_BOUND`.
        center: The interval, as in `clamp_singular_values`.
        start: Cores (b, r, r) to fall back to.

    Returns:
        The conditioned cores, and which of them come from S.
    """
    followed = _is_clippable(S)
    S = torch.where(per_matrix(followed), S, start)
    scale = S.abs().amax((1, 2), keepdim=True).double()
    clipped, feasible, certified = clip_by_products(
        S.double() / scale, bound, center, margin=2 * torch.finfo(S.dtype).eps
    )
    clipped = torch.where(per_matrix(certified), (clipped * scale).to(S.dtype), start)
    return torch.where(per_matrix(feasible), S, clipped), followed & certified


def _is_clippable(S: Tensor) -> Tensor:  # (b, r, r) -> (b,) bool
    """Whether σ_min ≥ ‖S‖_F / `LARGEST_CONDITION`: SᵀS − σ²I is positive definite for that σ."""
    X = S.double()
    X = X / X.abs().amax((1, 2), keepdim=True)
    G = X.mT @ X
    identity = torch.eye(S.shape[-1], dtype=G.dtype, device=S.device)
    return torch.linalg.cholesky_ex(G - per_matrix(_trace(G) / LARGEST_CONDITION**2) * identity).info == 0


def extreme_singular_values(S: Tensor) -> tuple[Tensor, Tensor]:  # (b, r, r) -> (b,), (b,)
    """An upper bound of σ_max and a lower bound of σ_min, both within a relative ln(r)/2²⁰.

    λ_max(G)^p ≤ tr G^p ≤ r λ_max(G)^p for G = SᵀS and for its inverse, p = 2²⁰ by repeated squaring. The bound of σ_min
    is 0 where G has no Cholesky decomposition: rounding of G hides σ_min below about 1e-7 σ_max.
    """
    G = S.mT @ S
    inverse, exists = inverse_cholesky(G)
    largest, reciprocal = _largest_eigenvalue(torch.stack((G, inverse.mT @ inverse))).sqrt()
    return largest, torch.where(exists, 1 / reciprocal, torch.zeros_like(reciprocal))


def _largest_eigenvalue(G: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    """(tr G^p)^{1/p} ≥ λ_max of symmetric positive G. Powers are divided by their traces; the logarithms add up."""
    scale = _trace(G)
    P, logarithm = G / per_matrix(scale), scale.log()
    for k in range(1, _SQUARINGS + 1):
        P = P @ P
        scale = _trace(P)
        P = P / per_matrix(scale)
        logarithm = logarithm + scale.log() / 2**k
    return logarithm.exp()


def newton_schulz(X: Tensor, smallest: Tensor, iterations: int) -> Tensor:  # (*, r, r), (*,) -> (*, r, r)
    """The polar factor of X, ‖X‖₂ ≤ 1, whose singular values lie above `smallest`: X ← ρX (3I − ρ²XᵀX)/2.

    ρ² = 3/(1 + ℓ + ℓ²) with ℓ the least singular value maps ℓ and 1 to the same value, the next ℓ.
    """
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    low = per_matrix(smallest)
    for _ in range(iterations):
        rho_squared = 3 / (1 + low + low.square())
        rho = rho_squared.sqrt()
        X = X @ (1.5 * rho * identity - (rho * rho_squared / 2) * (X.mT @ X))
        low = (rho * low * (3 - rho_squared * low.square()) / 2).clamp_max(1)
    return X


def _iterations(low: float, end: float) -> int:
    """Iterations that `newton_schulz` needs to bring `low` to 1 − `end` in float64, and one more against rounding."""
    count = 1
    while low < 1 - end:
        rho_squared = 3 / (1 + low + low**2)
        low, count = rho_squared**0.5 * low * (3 - rho_squared * low**2) / 2, count + 1
    return count


def _interval_low(
    H: Tensor, smallest: Tensor, bound: Tensor, center: Center
) -> Tensor:  # (b, r, r), (b,), (b,) -> (b,)
    """a of the interval [a, βa] for symmetric positive H with spectrum in [`smallest`, 1]."""
    r = H.shape[-1]
    if center != "nearest":
        middle = H.square().sum((-2, -1)).div(r).sqrt() if center == "rms" else _trace(H) / r
        return 2 * middle / (1 + bound)
    # Nothing lies below a = σ_min, nothing above βa = σ_max: between the two is the root. Exact where r = 2.
    low = (smallest + bound) / (1 + bound.square())
    identity = torch.eye(r, dtype=H.dtype, device=H.device)
    for _ in range(_NEWTON_STEPS):
        ends = torch.stack((low, low * bound))
        below, above = _sign(H - per_matrix(ends) * identity, ends, smallest, _COARSE, _NEARLY)
        # Eigenvalues with sign −1 at a lie below it, those with sign 1 at βa above.
        count_low, count_high = (r - _trace(below)) / 2, (r + _trace(above)) / 2
        sum_low = (_trace(H) - (below * H).sum((-2, -1))) / 2
        sum_high = (_trace(H) + (above * H).sum((-2, -1))) / 2
        slope = (count_low + bound.square() * count_high).clamp_min(1)
        root = (sum_low + bound * sum_high) / slope
        low = torch.minimum(torch.maximum(root, torch.minimum(smallest, 1 / bound)), 1 / bound)
    return low


def _sign(
    X: Tensor, ends: Tensor, smallest: Tensor, resolution: float, end: float
) -> Tensor:  # (2, b, r, r), (2, b), (b,) -> (2, b, r, r)
    """sign(X) of X = H − end·I, spectrum of H in [`smallest`, 1].

    Eigenvalues above `resolution`·‖X‖ end within `end` of ±1.
    """
    # Of a core near its bound the norm is small, and the resolution fine in relation to σ.
    norm = torch.maximum(ends - smallest, 1 - ends).abs().clamp_min(resolution)
    return newton_schulz(X / per_matrix(norm), torch.full_like(norm, resolution), _iterations(resolution, end))


def _within(S: Tensor, low: Tensor, high: Tensor) -> Tensor:  # (b, r, r), (b,), (b,) -> (b,) bool
    """Whether all singular values lie in [low, high]: SᵀS − low²I and high²I − SᵀS are positive definite."""
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    G = S.mT @ S
    info = torch.linalg.cholesky_ex(
        torch.stack((G - per_matrix(low.square()) * identity, per_matrix(high.square()) * identity - G))
    ).info
    return (info == 0).all(0)


def _trace(X: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    return X.diagonal(dim1=-2, dim2=-1).sum(-1)
