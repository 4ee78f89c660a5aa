"""Pure, batched linear algebra of the constraint W = U S Vᵀ, UᵀU = VᵀV = I, κ(S) ≤ 1 + τ.

Every function takes stacks of matrices `(*, m, r)`, in any floating dtype on any device, computes in at least
float32 and returns the dtype it was given. Source: Savostianova et al., NeurIPS 2023 (arXiv 2306.01485); retractions
as in Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, section 4.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_condlr.errors import ConditioningError, ConfigError, ConvergenceError

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stub does not export it
Center = Literal["nearest", "rms", "mean"]
CENTERS: tuple[Center, ...] = ("nearest", "rms", "mean")

# κ(S) is called feasible up to this relative excess over 1 + τ: what rounding S to its dtype can move, with a margin.
FEASIBILITY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


# ----------------------------------------------------------------------------------------------- tangent spaces


def project_horizontal(U: Tensor, G: Tensor) -> Tensor:  # (*, m, r), (*, m, r) -> (*, m, r)
    """(I − UUᵀ)G, without ever forming the m×m projector.

    The part of G that moves the span of U. U's rotations within its span are dropped: S absorbs them.
    """
    U_, G_ = _at_least_float32(U), _at_least_float32(G)
    return (G_ - U_ @ (U_.mT @ G_)).to(G.dtype)


def project_tangent(U: Tensor, G: Tensor) -> Tensor:  # (*, m, r), (*, m, r) -> (*, m, r)
    """G − U sym(UᵀG), the orthogonal projection on the tangent space of the Stiefel manifold at U."""
    U_, G_ = _at_least_float32(U), _at_least_float32(G)
    A = U_.mT @ G_
    return (G_ - U_ @ ((A + A.mT) / 2)).to(G.dtype)


def orthonormality_error(U: Tensor) -> Tensor:  # (*, m, r) -> (*,)
    """‖UᵀU − I‖_F, in float64."""
    U = _float64(U)
    return torch.linalg.matrix_norm(U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device))


# ------------------------------------------------------------------------------------------------- retractions


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
    X_ = _at_least_float32(X)
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
    scale = _scale(X).to(X.dtype) if m else X.new_ones(*X.shape[:-2], 1, 1)
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


def per_matrix(x: Tensor) -> Tensor:  # (*,) -> (*, 1, 1)
    """A number for each matrix of a stack, to multiply or to mask it by."""
    return x.unsqueeze(-1).unsqueeze(-1)


def _normalised(X: Tensor) -> Tensor:  # (*, m, r) -> (*, m, r), at least float32
    """X/max|X|, of which Q and the polar factor are the same: no inner product overflows."""
    X = _at_least_float32(X)
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
    Q_U, R_U = torch.linalg.qr(_at_least_float32(U))
    Q_V, R_V = torch.linalg.qr(_at_least_float32(V))
    core = R_U @ _at_least_float32(S) @ R_V.mT
    return Q_U.to(U.dtype), core.to(S.dtype), Q_V.to(V.dtype)


# ------------------------------------------------------------------------------------- singular values and their clip


def singular_values(S: Tensor) -> Tensor:  # (*, m, n) -> (*, min(m, n))
    """Singular values in descending order, in float64, relative to max|S| until the last step: no scale overflows."""
    scale = _scale(S)
    X = _float64(S) / scale
    try:
        sigma = torch.linalg.svdvals(X)
    except LinAlgError:
        sigma = robust_svd(X)[1]
    return sigma * scale.squeeze(-1)


def condition_number(S: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    """κ(S) = σ_max/σ_min in float64; inf for a singular, NaN for a zero S."""
    sigma = singular_values(S)
    return sigma[..., 0] / sigma[..., -1]


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
        Cores with κ ≤ 1 + τ after rounding to their dtype: the interval is narrowed by what rounding can move, a
        relative 2 eps (1+τ). Only where that would ask for less than κ = 1 (τ of the order of eps) an excess
        remains, at most `FEASIBILITY_TOLERANCE`, in half precision eps.

    Raises:
        ConditioningError: A core is zero or not finite.

    The spectrum is taken from the Gram matrix in float64, which squares κ: where that is not accurate enough, from an
    SVD. (float32 `svd` itself is unusable here: after clipping many σ coincide, and LAPACK's gesdd then now and then
    does not converge.)
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
    scale = _scale(cores)
    X = _float64(cores) / scale
    clamped, feasible = _clamp(X, 1 + tau_, center, S.dtype)
    clamped = (clamped * scale).to(device=S.device, dtype=S.dtype)
    return torch.where(feasible.to(S.device)[:, None, None], cores, clamped).reshape(S.shape)


def is_conditionable(S: Tensor) -> Tensor:  # (*, r, r) -> (*,) bool
    """Whether S is finite, not zero, and of a scale at which its dtype still resolves relative differences."""
    info = torch.finfo(S.dtype)
    # Subnormal numbers may be flushed to zero; float16, which has little else, keeps them.
    least = 16 * info.tiny if S.dtype == torch.float16 else info.tiny / info.eps
    largest = S.abs().amax(dim=(-2, -1))
    return torch.isfinite(largest) & (largest >= least) & (largest <= info.max / (4 * S.shape[-1]))


def _clamp(X: Tensor, bound: Tensor, center: Center, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Clip float64 cores (b, r, r) with max|X| = 1 to κ ≤ bound (b,), to be rounded to `dtype`.

    Returns the clipped cores, and which were feasible as given.
    """
    r = X.shape[-1]
    tolerance = FEASIBILITY_TOLERANCE.get(dtype, 1e-6)
    try:
        eigenvalues, Q = torch.linalg.eigh(X.mT @ X)
        # Squaring makes the relative error of σ_min about r eps κ²: trusted where that stays below the tolerance.
        accurate = eigenvalues[:, 0] * tolerance > 10 * r * torch.finfo(X.dtype).eps * eigenvalues[:, -1]
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


# ---------------------------------------------------------------------------------------------- factorisations


def random_factors(
    m: int, n: int, r: int, rms: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random orthonormal U (m, r), V (n, r) and S = rms · Q with a random orthogonal Q (r, r): κ(S) = 1."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    U, V, Q = (retract_qr(torch.randn(k, r, dtype=wide, device=device)) for k in (m, n, r))
    return U.to(dtype), (rms * Q).to(dtype), V.to(dtype)


def truncated_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:  # (m, n) -> (m, r), (r, r), (n, r)
    """The best rank-r approximation W ≈ U S Vᵀ in every unitarily invariant norm (Eckart–Young), S diagonal here."""
    P, sigma, Qh = robust_svd(_at_least_float32(W))
    return P[:, :r].to(W.dtype), torch.diag(sigma[:r]).to(W.dtype), Qh[:r].mT.to(W.dtype)


def robust_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*, m, n) -> (*, m, k), (*, k), (*, k, n), k = min(m, n)
    """Reduced SVD X = P diag(σ) Qᵀ that survives LAPACK's failures to converge.

    Tries X as it is, then each matrix alone in float64: as it is, transposed, and turned by random rotations, each of
    which is a fresh problem with the same singular values.
    """
    try:
        P, sigma, Qh = torch.linalg.svd(_at_least_float32(X), full_matrices=False)
        return P.to(X.dtype), sigma.to(X.dtype), Qh.to(X.dtype)
    except LinAlgError:
        flat = X.reshape(-1, *X.shape[-2:])
        triples = zip(*(_svd_of_one(_float64(x)) for x in flat), strict=True)
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
            Z = retract_qr(torch.randn(X.shape[1], X.shape[1], generator=generator, dtype=X.dtype)).to(X.device)
            P, sigma, Qh = torch.linalg.svd(X @ Z, full_matrices=False)
            return P, sigma, Qh @ Z.mT
        except LinAlgError:
            continue
    raise ConvergenceError(
        "the singular value decomposition must converge",
        received=f"{attempts} failures on a {tuple(X.shape)} matrix with max|X| = {X.abs().max().item():.3g}",
        remedy="Check that the matrix is finite; the LAPACK behind torch may be broken.",
    )


# ------------------------------------------------------------------------------------------------------ precision


def _at_least_float32(X: Tensor) -> Tensor:
    """Half precision widened: LAPACK has no half kernels, and a Gram matrix in bfloat16 has two digits."""
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def wide_device(X: Tensor) -> torch.device:
    """Where float64 numbers of X can lie."""
    return torch.device("cpu") if X.device.type == "mps" else X.device  # MPS has no float64


def _float64(X: Tensor) -> Tensor:
    return X.to(device=wide_device(X), dtype=torch.float64)


def _scale(S: Tensor) -> Tensor:  # (*, m, n) -> (*, 1, 1), float64; 1 where S = 0
    largest = _float64(S.abs().amax(dim=(-2, -1), keepdim=True))
    return torch.where(largest > 0, largest, torch.ones_like(largest))
