"""Factors that can be roundings of factors within the guarantee, and factors that cannot, against float64 NumPy."""

import math

import numpy as np
import pytest
import torch

from hf_condlr.checkpoints.rounding import can_be_orthonormal, least_condition_number
from hf_condlr.linalg import ORTHONORMALITY_TOLERANCE

M, R = 96, 24
ROUNDOFF = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MANY, ONE = np.ones(R), np.eye(R)[0]


def basis(error, share):
    """A float64 basis with ‖UᵀU − I‖_F = error, spread over directions by `share`."""
    U, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((M, R)))
    Z, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((R, R)))
    stretched = U @ (Z * np.sqrt(1 + error * share / np.linalg.norm(share)))
    assert np.linalg.norm(stretched.T @ stretched - np.eye(R)) == pytest.approx(error, rel=1e-6)
    return stretched


@pytest.mark.parametrize("share", [MANY, ONE], ids=["every direction", "one direction"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.0, 0.45, 0.55, 0.98, 1.02, 3.0])
def test_the_tolerance_is_that_of_the_guarantee_and_of_rounding(factor, dtype, share):
    """In every dtype of a file: the float32 Gram matrix only says yes where there is no doubt."""
    u = ROUNDOFF[dtype]
    allowed = ORTHONORMALITY_TOLERANCE * math.sqrt(R) + 2 * u * math.sqrt(R) + u * u * R
    U = torch.from_numpy(basis(factor * allowed, share))
    assert can_be_orthonormal(U, dtype) is (factor < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_orthonormal_bases_are_accepted(dtype):
    assert can_be_orthonormal(torch.from_numpy(basis(0, ONE)).to(dtype), dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_finite_or_huge_is_refused(value):
    U = torch.from_numpy(basis(0, ONE)).float()
    U[3, 2] = value
    assert not can_be_orthonormal(U, torch.float32)


def test_autocast_changes_no_verdict():
    """In bfloat16 the Gram matrix of this basis would round to the identity."""
    U = torch.from_numpy(basis(1e-3, MANY)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_be_orthonormal(U, torch.float32)


@pytest.mark.parametrize("kappa", [1.0, 1.1, 30.0, 1e6, 1e14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_least_condition_number_allows_for_rounding(kappa, dtype):
    rng = np.random.default_rng(2)
    P, Q = (np.linalg.qr(rng.standard_normal((R, R)))[0] for _ in range(2))
    S = P * np.geomspace(kappa, 1, R) @ Q.T
    sigma, slack = np.linalg.svd(S, compute_uv=False), (2.0**-53 + ROUNDOFF[dtype]) * np.linalg.norm(S)
    expected = (sigma[0] - slack) / (sigma[-1] + slack)
    assert least_condition_number(torch.from_numpy(S), dtype) == pytest.approx(expected, rel=max(2e-9, 1e-15 * kappa))


def test_a_core_that_is_not_finite_has_an_infinite_condition_number():
    assert least_condition_number(torch.full((3, 3), math.nan), torch.float32) == math.inf
