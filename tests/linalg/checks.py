"""Tolerances, tensors and assertions of the tests of `hf_condlr.linalg`, against the float64 reference."""

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from tests.linalg import cases, reference


def cholesky_or_qr(X):
    """Cholesky-QR where it is trusted and Householder QR elsewhere, as in the manifold step."""
    Q, trusted = linalg.retract_cholesky(X)
    return torch.where(trusted[..., None, None], Q, linalg.retract_qr(X))


RETRACTIONS = {"qr": linalg.retract_qr, "cholesky": cholesky_or_qr, "polar": linalg.retract_polar}
REFERENCES = {"qr": reference.qr, "cholesky": reference.qr, "polar": reference.polar}
# Relative to the largest entry; measured: float32 9e-7, float64 5e-15.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Clipped singular values relative to the largest; measured: float32 2.4e-5 (the interval is narrowed by up to 3e-5),
# float64 9e-12 (from a Gram matrix).
CLIPPED = {torch.float32: 4e-5, torch.float64: 1e-9}
# ‖UᵀU − I‖_F / √r; measured: float32 1.7e-6, float64 2e-15, bfloat16 3.5e-3, float16 3.6e-4.
ORTHONORMAL = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
# κ/(1 + τ) − 1; measured: float32 8.7e-8 (at τ = 0, elsewhere below 0), float64 9e-12.
KAPPA = {torch.float32: 1e-4, torch.float64: 1e-6}

each_shape = pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
each_half = pytest.mark.parametrize("dtype", cases.HALF_DTYPES.values(), ids=cases.HALF_DTYPES)
each_seed = pytest.mark.parametrize("seed", cases.SEEDS)
each_core = pytest.mark.parametrize("name", cases.CORES)
each_center = pytest.mark.parametrize("center", cases.CENTERS)
each_retraction = pytest.mark.parametrize("name", RETRACTIONS)


def tensor(array, dtype=torch.float64):
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def core(name, r, dtype=torch.float64):
    """The core rounded to `dtype`, and the same values as a float64 array."""
    S = tensor(cases.CORES[name](r), dtype)
    return S, reference.array(S)


def assert_close(actual, expected, dtype=torch.float64):
    assert actual.dtype == dtype
    error = np.abs(reference.array(actual) - expected).max() / np.abs(expected).max()
    assert error <= CLOSE[dtype], error


def assert_orthonormal(U):
    error = reference.orthonormality_error(reference.array(U)) / np.sqrt(U.shape[-1])
    assert error <= ORTHONORMAL[U.dtype], error


def assert_kappa_at_most(S, bound):
    kappa = reference.condition_number(reference.array(S))
    assert kappa <= bound * (1 + KAPPA[S.dtype]), (kappa, bound)
