"""The method in float64 NumPy, one matrix at a time, transcribed from its formulas; slow and plain on purpose.

U (m, r) and V (n, r) have orthonormal columns, S is (r, r), W = U S Vᵀ. Source: Savostianova et al., NeurIPS 2023
(arXiv 2306.01485); retractions: Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008.
"""

import numpy as np


def array(tensor):
    """A float64 NumPy copy of a torch tensor."""
    return tensor.detach().cpu().double().numpy().copy()


# ------------------------------------------------------------------------------------------- tangents, retractions


def project_horizontal(U, G):
    """(I − UUᵀ)G, with the dense projector."""
    return (np.eye(len(U)) - U @ U.T) @ G


def project_tangent(U, G):
    """G − U sym(UᵀG)."""
    A = U.T @ G
    return G - U @ (A + A.T) / 2


def qr(X):
    """Q of X = QR with diag(R) > 0."""
    Q, R = np.linalg.qr(X)
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)


def polar(X):
    """X(XᵀX)^{-1/2} = PQᵀ for X = PΣQᵀ."""
    P, _, Qh = np.linalg.svd(X, full_matrices=False)
    return P @ Qh


def projector(U):
    """UUᵀ: what every retraction with the same span agrees on."""
    return U @ U.T


def orthonormality_error(U):
    """‖UᵀU − I‖_F."""
    return np.linalg.norm(U.T @ U - np.eye(U.shape[1]))


# --------------------------------------------------------------------------------------------------- conditioning


def singular_values(S):
    """Descending; scaled by max|S| first, so that 1e30 and 1e-30 are as good as 1."""
    scale = np.abs(S).max() or 1.0
    return scale * np.linalg.svd(S / scale, compute_uv=False)


def condition_number(S):
    """σ_max/σ_min, inf for σ_min = 0 and NaN for S = 0."""
    sigma = singular_values(S)
    with np.errstate(divide="ignore", invalid="ignore"):
        return sigma[0] / sigma[-1]


def squared_distance(sigma, a, bound):  # (r,), (k,) -> (k,)
    """Σ dist(σ_i, [a, bound·a])² for each a."""
    sigma, a = np.asarray(sigma)[:, None], np.atleast_1d(a)[None]
    return (np.maximum(a - sigma, 0) ** 2 + np.maximum(sigma - bound * a, 0) ** 2).sum(0)


def nearest_low(sigma, bound):
    """The a > 0 that minimises Σ dist(σ_i, [a, bound·a])², by trying everything.

    The objective is quadratic between neighbouring breakpoints σ_i, σ_i/bound: the candidates are all breakpoints and
    the vertex of each of these parabolas, moved into its interval. No point of a dense grid may be better.
    """
    top = np.max(sigma)
    sigma = np.asarray(sigma) / top
    breakpoints = np.unique(np.concatenate([sigma, sigma / bound]))
    left, right = breakpoints[:-1, None], breakpoints[1:, None]
    middle = (left + right) / 2
    below, above = sigma < middle, sigma > bound * middle
    weight = below.sum(1) + bound**2 * above.sum(1)
    vertex = ((below + bound * above) * sigma).sum(1) / np.maximum(weight, 1)
    candidates = np.concatenate([breakpoints, np.clip(vertex, left[:, 0], right[:, 0])])
    candidates = candidates[candidates > 0]
    values = squared_distance(sigma, candidates, bound)
    grid = np.concatenate([np.linspace(1e-3, 1, 400), np.geomspace(1e-6, 1, 200)])
    assert values.min() <= squared_distance(sigma, grid, bound).min() + 1e-14
    return top * candidates[values.argmin()]


def rms(sigma):
    """‖S‖_F/√r."""
    sigma = np.asarray(sigma)
    return np.max(sigma) * np.sqrt(np.mean((sigma / np.max(sigma)) ** 2))


def interval(sigma, bound, center):
    """(low, high) with high/low = bound = 1 + τ."""
    if center == "nearest":
        low = nearest_low(sigma, bound)
        return low, bound * low
    c = {"rms": rms, "mean": np.mean}[center](sigma)
    tau = bound - 1
    e = c * tau / (2 + tau)
    return c - e, c + e


def condition(S, bound, center="nearest"):
    """S itself where κ(S) ≤ bound, else S with its singular values clipped to the interval."""
    sigma = singular_values(S)
    if np.isinf(bound) or sigma[0] <= bound * sigma[-1]:
        return S.copy()
    scale = np.abs(S).max()
    P, _, Qh = np.linalg.svd(S / scale)
    return P * np.clip(sigma, *interval(sigma, bound, center)) @ Qh


# ----------------------------------------------------------------------------------------------------------- step


def manifold_step(U, S, V, U_new, S_new, V_new, bound, center, retraction=polar):
    """What the manifold step makes of an optimizer's (U, S, V) -> (U_new, S_new, V_new), all gradients finite.

    Displacements go back to the horizontal space, bases are retracted, the core is conditioned to κ ≤ bound = 1 + τ.
    `retraction` is `polar` or `qr` (which is Cholesky-QR, too); compare `projector`s to be independent of it.
    """
    U_next = retraction(U + project_horizontal(U, U_new - U))
    V_next = retraction(V + project_horizontal(V, V_new - V))
    return U_next, condition(S_new, bound, center), V_next
