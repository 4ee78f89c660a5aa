"""Starts from a dense weight: the truncation error against the tail of NumPy's spectrum, and orthogonal factors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.factorizations import (
    FACTORIZATIONS,
    optimal_truncation_error,
    orthogonal,
    randomized_svd,
    truncation_error,
)
from hf_condlr.linalg import truncated_svd
from tests.linalg.reference import array

SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
CASES = [
    pytest.param(m, n, r, id=f"{name}-r{r}")
    for name, (m, n) in SHAPES.items()
    for r in sorted({1, (min(m, n) + 1) // 2, min(m, n)})
]


def tail(W, r):
    """√(Σ_{i>r} σ_i²) / √(Σ σ_i²) (Eckart–Young)."""
    sigma = np.linalg.svd(array(W), compute_uv=False)
    return math.sqrt((sigma[r:] ** 2).sum() / (sigma**2).sum())


def error(W, factors):
    """‖W − U S Vᵀ‖_F / ‖W‖_F."""
    U, S, V = map(array, factors)
    return np.linalg.norm(array(W) - U @ S @ V.T) / np.linalg.norm(array(W))


def assert_orthonormal(U, tolerance):
    U = array(U)
    assert np.linalg.norm(U.T @ U - np.eye(U.shape[1])) <= tolerance * math.sqrt(U.shape[1])


def decaying(m, n, rate=0.8, dtype=torch.float64):
    """A weight with singular values rate⁰, rate¹, …"""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64)).Q for size in (m, n))
    return (U * rate ** torch.arange(k) @ V.mT).to(dtype)


# -------------------------------------------------------------------------------------------------------- every start


@pytest.mark.parametrize("start", [truncated_svd, randomized_svd, orthogonal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "r"), CASES)
def test_shapes_dtype_and_orthonormality(start, m, n, r, dtype):
    W = torch.randn(m, n).to(dtype)
    U, S, V = start(W, r)
    assert (U.shape, S.shape, V.shape) == ((m, r), (r, r), (n, r))
    assert {U.dtype, S.dtype, V.dtype} == {dtype}
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_orthonormal(U, tolerance)
    assert_orthonormal(V, tolerance)


def test_config_and_starts_know_the_same_names():
    for name in FACTORIZATIONS:
        assert CondLRConfig(r=1, init_weights=name).init_weights == name
    assert {"svd", "randomized_svd", "orthogonal"} <= set(FACTORIZATIONS)


# ---------------------------------------------------------------------------------------------------------------- svd


@pytest.mark.parametrize(("m", "n", "r"), CASES)
def test_the_error_of_the_svd_is_the_tail_of_the_spectrum(m, n, r):
    W = torch.randn(m, n, dtype=torch.float64)
    factors = truncated_svd(W, r)
    assert error(W, factors) == pytest.approx(tail(W, r), rel=1e-10, abs=1e-13)
    assert truncation_error(W, *factors) == pytest.approx(tail(W, r), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_the_svd_in_half_precision_is_the_tail_and_rounding(dtype):
    W = decaying(20, 12, dtype=dtype)
    assert error(W, truncated_svd(W, 4)) == pytest.approx(tail(W, 4), rel=0.01)
    assert truncation_error(W, *truncated_svd(W, 12)) < 2 * torch.finfo(dtype).eps


def test_svd_draws_no_random_numbers():
    before = torch.get_rng_state()
    truncated_svd(torch.arange(12.0).reshape(3, 4), 2)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "r"), CASES)
def test_the_optimum_is_the_tail_of_the_spectrum(m, n, r, dtype):
    W = torch.randn(m, n, dtype=dtype)
    # relative to ‖W‖: the Gram matrix squares the spectrum, so that 1e-16 becomes 1e-8
    assert optimal_truncation_error(W, r) == pytest.approx(tail(W, r), rel=1e-7, abs=3e-8)


def test_the_optimum_at_a_strong_decay():
    W = decaying(30, 20, rate=0.5)
    for r in (1, 5, 10, 15):
        assert optimal_truncation_error(W, r) == pytest.approx(tail(W, r), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_errors_do_not_depend_on_the_scale(scale):
    W = torch.randn(10, 6)
    optimum = optimal_truncation_error(W, 3)
    assert optimal_truncation_error(scale * W, 3) == pytest.approx(optimum, rel=1e-5)
    assert truncation_error(scale * W, *truncated_svd(scale * W, 3)) == pytest.approx(optimum, rel=1e-4)


def test_errors_of_a_zero_weight_are_zero():
    W = torch.zeros(4, 3)
    assert optimal_truncation_error(W, 2) == 0
    assert truncation_error(W, torch.ones(4, 2), torch.zeros(2, 2), torch.ones(3, 2)) == 0


# ------------------------------------------------------------------------------------------------------ randomized svd


@pytest.mark.parametrize("rate", [0.6, 0.9, 0.98])
@pytest.mark.parametrize(("m", "n"), [(150, 90), (90, 150)])
def test_randomized_svd_comes_close_to_the_optimum(m, n, rate):
    """Over 60 seeds at most 1.0003 times the optimum, at the slowest decay."""
    W = decaying(m, n, rate)
    optimum = tail(W, 20)
    assert optimum * (1 - 1e-9) <= error(W, randomized_svd(W, 20)) <= 1.001 * optimum


def test_randomized_svd_comes_close_where_nothing_decays():
    """A Gaussian weight, the hardest case: over 60 seeds 1.0003 to 1.0011 times the optimum."""
    W = torch.randn(150, 90)
    assert error(W, randomized_svd(W, 20)) <= 1.005 * tail(W, 20)


def test_randomized_svd_of_a_weight_of_that_rank_is_exact():
    W = torch.randn(60, 5, dtype=torch.float64) @ torch.randn(5, 40, dtype=torch.float64)
    assert error(W, randomized_svd(W, 5)) < 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
def test_randomized_svd_at_full_rank_is_exact(m, n):
    W = torch.randn(m, n)
    assert error(W, randomized_svd(W, min(m, n))) < 1e-5


def test_randomized_svd_has_the_leading_singular_values_in_order():
    W = decaying(80, 60)
    _, S, _ = randomized_svd(W, 10)
    assert np.allclose(array(S), np.diag(0.8 ** np.arange(10)), atol=1e-6)


def test_randomized_svd_repeats_with_the_seed():
    W = torch.randn(50, 40)
    torch.manual_seed(7)
    first = randomized_svd(W, 3)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, randomized_svd(W, 3), strict=True))


@pytest.mark.parametrize("shape", [(150, 90), (90, 150)])
def test_conversion_reports_the_error_of_randomized_svd_beside_the_optimum(shape):
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m))
    W = model[0].weight.detach().clone()
    get_robust_lowrank_model(model, CondLRConfig(r=20, init_weights="randomized_svd"))
    report = model.condlr.report.converted["0"]
    assert report.truncation_error == pytest.approx(error(W, (model[0].U, model[0].S, model[0].V)), rel=1e-5)
    assert report.optimal_truncation_error == pytest.approx(tail(W, 20), rel=1e-5)
    assert (
        report.optimal_truncation_error * (1 + 1e-4)
        < report.truncation_error
        <= 1.005 * report.optimal_truncation_error
    )


def test_conversion_reports_the_error_of_svd():
    model = nn.Sequential(nn.Linear(20, 30))
    W = model[0].weight.detach().clone()
    get_robust_lowrank_model(model, CondLRConfig(r=6))
    report = model.condlr.report.converted["0"]
    assert (report.r, report.shape, report.parameters) == (6, (30, 20), 6 * 50 + 36)
    assert report.truncation_error == pytest.approx(tail(W, 6), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- orthogonal


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("m", "n", "r"), CASES)
def test_orthogonal_start_has_equal_singular_values_at_the_rms_of_the_weight(m, n, r, scale):
    W = scale * torch.randn(m, n)
    _, S, _ = orthogonal(W, r)
    rms = math.sqrt((np.linalg.svd(array(W), compute_uv=False) ** 2).mean())
    sigma = np.linalg.svd(array(S), compute_uv=False)
    assert np.allclose(sigma, rms, rtol=1e-5)
    assert sigma.max() / sigma.min() <= 1 + 1e-5


def test_orthogonal_start_is_random_in_every_factor_and_forgets_the_weight():
    W = torch.randn(30, 20)
    torch.manual_seed(1)
    first = orthogonal(W, 5)
    again = orthogonal(W, 5)
    torch.manual_seed(1)
    repeated = orthogonal(-W, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[1], torch.diag(first[1].diagonal()), atol=0.01)


def test_orthogonal_start_of_a_large_half_precision_weight_does_not_overflow():
    W = torch.full((300, 300), 500.0).to(torch.float16)  # ‖W‖_F = 150 000, above the largest float16
    _, S, _ = orthogonal(W, 4)
    assert np.allclose(np.linalg.svd(array(S), compute_uv=False), 500 * 300 / math.sqrt(300), rtol=1e-2)
