"""The table of cases every numerical test runs over: shapes, dtypes, seeds, tolerances κ − 1, and nasty cores S."""

import numpy as np
import torch
from safetensors.torch import load_file

from tests.paths import ROOT

# name: (m, n, r) of W = U S Vᵀ, U (m, r), S (r, r), V (n, r)
SHAPES = {
    "tall": (24, 9, 5),
    "wide": (9, 24, 5),
    "square": (12, 12, 4),
    "r = 1": (11, 7, 1),
    "r = min": (13, 6, 6),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SEEDS = (0, 1, 2)
TAUS = (0.0, 1e-3, 0.1, 0.5, 3.0, 100.0, float("inf"))
CENTERS = ("nearest", "rms", "mean")


def orthonormal(m, r, seed=0):  # -> (m, r) float64
    """Random orthonormal columns, of a random stream that no `default_rng(seed)` of a test repeats."""
    return np.linalg.qr(np.random.default_rng([seed, m, r]).standard_normal((m, r)))[0]


def with_singular_values(sigma, seed=0):  # (r,) -> (r, r) float64
    """P diag(σ) Qᵀ with random orthogonal P and Q."""
    r = len(sigma)
    return orthonormal(r, r, 2 * seed) * np.asarray(sigma) @ orthonormal(r, r, 2 * seed + 1).T


def factors(m, n, r, seed=0):  # -> (m, r), (r, r), (n, r) float64
    """Orthonormal U and V, and a random core."""
    S = np.random.default_rng(seed + 100).standard_normal((r, r))
    return orthonormal(m, r, 3 * seed + 1), S, orthonormal(n, r, 3 * seed + 2)


def _random(r, seed=0):
    return np.random.default_rng(seed).standard_normal((r, r))


def _zeros_among(r):
    sigma = np.linspace(2, 1, r)
    sigma[(r + 1) // 2 :] = 0
    return sigma


# name: r -> (r, r) float64, none of them zero
CORES = {
    "random": _random,
    "zero singular values": lambda r: with_singular_values(_zeros_among(r)),
    "exact zeros": lambda r: np.diag(_zeros_among(r)),
    "repeated": lambda r: with_singular_values(np.where(np.arange(r) % 2, 1.0, 5.0)),
    "huge": lambda r: 1e30 * _random(r, 1),
    "tiny": lambda r: 1e-30 * with_singular_values(np.linspace(3, 1, r)),
    "rank one": lambda r: np.outer(*np.random.default_rng(2).standard_normal((2, r))),
    "ones": lambda r: np.ones((r, r)),
    "twelve decades": lambda r: np.diag(np.logspace(0, -12, r)),
    "twelve decades, rotated": lambda r: with_singular_values(np.logspace(0, -12, r)),
    "orthogonal": lambda r: orthonormal(r, r, 3),
    "huge orthogonal": lambda r: 1e30 * orthonormal(r, r, 4),
    "negative": lambda r: -np.diag(np.arange(1.0, r + 1)),
    "triangular": lambda r: np.triu(_random(r, 5)),
}
# Those whose conditioned form is unique: no singular value so small that its singular vectors are rounding.
WELL_POSED = ("random", "repeated", "huge", "tiny", "orthogonal", "huge orthogonal", "negative")


def core_without_svd():  # -> (192, 192) float32
    """A core on which LAPACK's gesdd does not converge in float32; it converges transposed and in float64."""
    return load_file(ROOT / "tests" / "data" / "svd_does_not_converge.safetensors")["S"]


def matrix_with_nan_svd():  # -> (352, 352) float32
    """A finite matrix of which LAPACK's gesdd returns NaN in float32 on some CPUs, without an error."""
    return load_file(ROOT / "tests" / "data" / "svd_returns_nan.safetensors")["X"]
