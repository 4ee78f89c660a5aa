"""Condition numbers and the clip of singular values, against the float64 reference."""

import pickle

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from hf_condlr.errors import ConditioningError, ConfigError
from hf_condlr.linalg.conditioning import surely_feasible
from tests.linalg import cases, reference
from tests.linalg.checks import (
    CLIPPED,
    CLOSE,
    KAPPA,
    assert_close,
    assert_kappa_at_most,
    core,
    each_center,
    each_core,
    each_dtype,
    each_half,
    each_seed,
    tensor,
)


@each_core
@each_dtype
@pytest.mark.parametrize("r", [1, 2, 6, 24])
def test_condition_number_and_singular_values_equal_the_reference(name, dtype, r):
    S, exact = core(name, r, dtype)
    sigma = linalg.singular_values(S)
    assert sigma.dtype == torch.float64
    top = reference.singular_values(exact)[0]
    np.testing.assert_allclose(sigma.numpy(), reference.singular_values(exact), rtol=1e-12, atol=1e-14 * top)
    expected, kappa = reference.condition_number(exact), linalg.condition_number(S)
    assert kappa.dtype == torch.float64
    if expected < 1e8:
        assert kappa.item() == pytest.approx(expected, rel=1e-7)
    else:  # σ_min is rounding, or zero
        assert kappa.item() > 1e8


@each_dtype
def test_condition_number_of_singular_zero_and_extreme_cores(dtype):
    assert linalg.condition_number(torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=dtype))) == torch.inf
    assert linalg.condition_number(torch.zeros(3, 3, dtype=dtype)).isnan()
    assert linalg.condition_number(torch.ones(3, 3, dtype=dtype)) > 1e15
    stack = torch.stack([torch.zeros(2, 2), torch.eye(2), torch.diag(torch.tensor([1.0, 4.0]))]).to(dtype)
    np.testing.assert_allclose(linalg.condition_number(stack).numpy(), [np.nan, 1, 4])
    info = torch.finfo(dtype)
    for scale in (info.max / 2, info.tiny * 2):
        S = torch.diag(torch.tensor([1.0, 0.5], dtype=dtype)) * scale
        assert linalg.condition_number(S).item() == pytest.approx(2, rel=1e-6)
        np.testing.assert_allclose(linalg.singular_values(S).numpy(), [scale, scale / 2], rtol=1e-6)


@each_core
@each_dtype
@each_center
@pytest.mark.parametrize("r", [1, 2, 6, 24])
def test_conditioning_equals_the_reference_and_keeps_the_bound(name, dtype, center, r):
    S, exact = core(name, r, dtype)
    size = np.abs(exact).max()
    for tau in cases.TAUS:
        before = S.clone()
        clamped = linalg.clamp_singular_values(S, tau, center=center)
        assert torch.equal(S, before) and clamped.dtype == dtype and clamped.shape == S.shape
        if reference.condition_number(exact) <= 1 + tau or tau == torch.inf:
            assert torch.equal(clamped, S)  # bitwise as it was
            continue
        assert_kappa_at_most(clamped, 1 + tau)
        assert torch.equal(linalg.clamp_singular_values(clamped, tau, center=center), clamped)
        expected = reference.condition(exact, 1 + tau, center)
        actual = reference.array(clamped)
        sigma, sigma_expected = reference.singular_values(actual), reference.singular_values(expected)
        np.testing.assert_allclose(sigma, sigma_expected, rtol=0, atol=CLIPPED[dtype] * sigma_expected[0])
        # The distance is that of the singular values only if the singular vectors stayed what they were.
        gap, gap_expected = (np.linalg.norm((X - exact) / size) for X in (actual, expected))
        assert gap == pytest.approx(gap_expected, abs=CLIPPED[dtype] * r)
        if name in cases.WELL_POSED:
            np.testing.assert_allclose(actual, expected, rtol=0, atol=CLIPPED[dtype] * sigma_expected[0])


@each_core
@each_dtype
def test_nearest_is_never_farther_than_rms_and_mean(name, dtype):
    for r in (2, 6, 24):
        S, exact = core(name, r, dtype)
        size = np.abs(exact).max()
        for tau in cases.TAUS:
            distance = {}
            for center in cases.CENTERS:
                clamped = linalg.clamp_singular_values(S, tau, center=center)
                distance[center] = np.linalg.norm((reference.array(clamped) - exact) / size)
            assert distance["nearest"] <= min(distance.values()) + CLOSE[dtype] * r


@pytest.mark.parametrize("kind", ["random", "with ties", "with zeros"])
@pytest.mark.parametrize("tau", [0.0, 0.05, 0.1, 0.5, 1.0, 3.0, 100.0])
def test_nearest_is_the_best_interval_of_many_spectra(kind, tau):
    """Breakpoints σ_i and σ_i/(1+τ) coincide, and (σ/(1+τ))(1+τ) is not always σ in floating point."""
    rng = np.random.default_rng(0)
    for r in (2, 3, 5, 8):
        sigma = rng.uniform(0.05, 1, (100, r)) if kind == "random" else rng.integers(1, 6, (100, r)).astype(float)
        if kind == "with zeros":
            sigma[:, 0] = 0
        clamped = linalg.clamp_singular_values(tensor(np.stack([np.diag(row) for row in sigma])), tau)
        for row, result in zip(sigma, clamped, strict=True):
            ordered, bound = np.sort(row), 1 + tau
            if ordered[-1] <= bound * ordered[0]:
                np.testing.assert_array_equal(result, np.diag(row))
                continue
            low = reference.nearest_low(ordered, bound)
            optimum = reference.squared_distance(ordered, low, bound).item()
            assert np.square(reference.array(result) - np.diag(row)).sum() <= optimum + 1e-10  # measured: 3e-14
            np.testing.assert_allclose(np.diag(result), np.clip(row, low, bound * low), rtol=1e-8)


@each_dtype
def test_rms_and_mean_equal_their_formulas(dtype):
    sigma = np.array([5.0, 3.0, 1.0, 0.5])
    S = tensor(cases.with_singular_values(sigma), dtype)
    for tau in (0.1, 0.5, 3.0):
        for center, c in (("rms", np.sqrt(np.mean(sigma**2))), ("mean", np.mean(sigma))):
            e = c * tau / (2 + tau)
            clamped = reference.array(linalg.clamp_singular_values(S, tau, center=center))
            expected = np.clip(sigma, c - e, c + e)
            np.testing.assert_allclose(reference.singular_values(clamped), expected, rtol=CLOSE[dtype])


@each_dtype
@each_seed
def test_zero_tau_gives_a_multiple_of_the_polar_factor(dtype, seed):
    for r in (1, 2, 6, 24):
        sigma = np.linspace(3, 1, r)
        S = tensor(cases.with_singular_values(sigma, seed), dtype)
        for center in cases.CENTERS:
            c = np.sqrt(np.mean(sigma**2)) if center == "rms" else np.mean(sigma)
            clamped = linalg.clamp_singular_values(S, 0, center=center)
            assert_close(clamped, c * reference.polar(reference.array(S)), dtype)


@each_dtype
def test_a_core_at_the_bound_stays_bitwise(dtype):
    for low, tau in ((1.0, 0.5), (0.1, 3.0), (3.0, 0.0), (7e-3, 0.1)):
        S = torch.diag(torch.tensor([low * (1 + tau), low, low], dtype=dtype))
        for center in cases.CENTERS:
            assert torch.equal(linalg.clamp_singular_values(S, tau, center=center), S)
    S = torch.diag(torch.tensor([1.5 * (1 + 1e-4), 1.0, 1.0], dtype=dtype))  # and a little above, it does not
    assert not torch.equal(linalg.clamp_singular_values(S, 0.5), S)
    assert_kappa_at_most(linalg.clamp_singular_values(S, 0.5), 1.5)


@each_center
@each_dtype
def test_each_core_of_a_stack_has_its_own_tau_and_fate(center, dtype):
    for r in (1, 2, 6):
        S = torch.stack([core(name, r, dtype)[0] for name in cases.CORES])
        tau = torch.tensor([cases.TAUS[i % len(cases.TAUS)] for i in range(len(S))])
        clamped = linalg.clamp_singular_values(S, tau, center=center)
        for one, alone, its_tau in zip(clamped, S, tau.tolist(), strict=True):
            expected = linalg.clamp_singular_values(alone, its_tau, center=center)
            assert torch.equal(one, alone) == torch.equal(expected, alone)
            assert_kappa_at_most(one, 1 + its_tau)
            gap = (one - expected).abs().max() / alone.abs().max()
            assert gap <= CLOSE[dtype] or reference.condition_number(reference.array(alone)) > 1e6
        grid = linalg.clamp_singular_values(S.reshape(2, -1, r, r), tau.double().reshape(2, -1), center=center)
        assert torch.equal(grid.reshape(S.shape), clamped)
        assert torch.equal(linalg.clamp_singular_values(S, torch.tensor(0.5)), linalg.clamp_singular_values(S, 0.5))


@each_dtype
def test_the_bound_decides_at_every_condition_number(dtype):
    """Around the κ at which the Gram matrix gives way to the SVD as well, and at ten times each side of it."""
    tolerance = 4 * torch.finfo(dtype).eps  # what rounding S to `dtype` moves κ by, relatively and times κ
    for kappa in np.geomspace(1.01, 1e5 if dtype == torch.float32 else 1e11, 60):
        S = tensor(cases.with_singular_values(np.geomspace(kappa, 1, 6)), dtype)
        actual = reference.condition_number(reference.array(S))
        above, below = actual * (1 + 1e-3 + tolerance * kappa), actual / (1 + 1e-3 + tolerance * kappa)
        assert torch.equal(linalg.clamp_singular_values(S, above - 1), S)
        if below > 1:
            clamped = linalg.clamp_singular_values(S, below - 1)
            assert not torch.equal(clamped, S)
            assert reference.condition_number(reference.array(clamped)) <= below * (1 + 1e-6 + tolerance * kappa)


def test_infinite_tau_returns_even_singular_cores():
    for name in cases.CORES:
        S = core(name, 6)[0]
        assert torch.equal(linalg.clamp_singular_values(S, float("inf")), S)


@each_dtype
def test_a_tau_beyond_the_dtype_is_kept_too(dtype):
    for name in ("exact zeros", "twelve decades, rotated", "rank one", "random"):
        S = core(name, 6, dtype)[0]
        for tau in (1e4, 1e6, 1e8):
            clamped = linalg.clamp_singular_values(S, tau)
            assert reference.condition_number(reference.array(clamped)) <= (1 + tau) * (1 + KAPPA[dtype])
            assert torch.equal(linalg.clamp_singular_values(clamped, tau), clamped)


def test_conditioning_errors():
    S = torch.stack([torch.eye(3), torch.zeros(3, 3), torch.eye(3)])
    with pytest.raises(ConditioningError, match=r"finite and not zero.*max\|S\| = 0 in core 1 of the stack.*reinitial"):
        linalg.clamp_singular_values(S, 0.1)
    for value in (torch.inf, -torch.inf, torch.nan):
        S = torch.eye(3)
        S[0, 1] = value
        with pytest.raises(ConditioningError, match=r"finite and not zero.* = (inf|nan) in core 0"):
            linalg.clamp_singular_values(S, 0.1)
    for tau in (-0.1, float("nan"), torch.tensor([0.1, -0.1])):
        with pytest.raises(ConfigError, match=r"tau must be ≥ 0; received (-0.1|nan)"):
            linalg.clamp_singular_values(torch.eye(3).expand(2, 3, 3), tau)
    with pytest.raises(ConfigError, match="center must be one of nearest, rms, mean; received 'median'"):
        linalg.clamp_singular_values(torch.eye(3), 0.1, center="median")


def test_conditionable_cores():
    assert linalg.is_conditionable(torch.stack([core(name, 6, torch.float32)[0] for name in cases.CORES])).all()
    S = torch.eye(3).repeat(4, 1, 1)
    S[0] = 0
    S[1, 0, 0], S[2, 2, 1] = torch.nan, -torch.inf
    assert linalg.is_conditionable(S).tolist() == [False, False, False, True]


@each_half
@each_center
@pytest.mark.parametrize("scale", [10.0, 1.0, 0.02])
def test_half_precision_cores_are_conditioned(dtype, center, scale):
    for r in (1, 2, 6, 24):
        for seed in cases.SEEDS:
            S = tensor(scale * cases.with_singular_values(np.linspace(1, 0.01, r), seed), dtype)
            for tau in (0.1, 0.5, 3.0):
                clamped = linalg.clamp_singular_values(S, tau, center=center)
                kappa = reference.condition_number(reference.array(clamped))
                assert clamped.dtype == dtype
                assert kappa <= (1 + tau) * (1 + 1e-6)  # after rounding to `dtype`, too
                assert torch.equal(linalg.clamp_singular_values(clamped, tau, center=center), clamped)
                expected = reference.condition(reference.array(S), 1 + tau, center)
                error = np.abs(reference.array(clamped) - expected).max()
                assert error <= 4 * (1 + tau) * torch.finfo(dtype).eps * reference.singular_values(expected)[0]


@each_half
def test_a_bound_finer_than_half_precision_is_kept_to_its_rounding(dtype):
    for seed in cases.SEEDS:
        S = tensor(cases.with_singular_values(np.linspace(1, 0.01, 24), seed), dtype)
        for tau in (0.0, 1e-3):
            kappa = reference.condition_number(reference.array(linalg.clamp_singular_values(S, tau)))
            assert kappa <= (1 + tau) * (1 + 2 * torch.finfo(dtype).eps)  # measured: 0.6 eps


def test_the_core_on_which_lapack_fails_is_conditioned(hard):
    S, P, sigma, Qh = hard
    assert linalg.is_conditionable(S)
    np.testing.assert_allclose(linalg.singular_values(S).numpy(), sigma, rtol=1e-12)
    assert linalg.condition_number(S).item() == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
    for tau in (0.0, 1e-3, 0.05):
        assert sigma[0] > (1 + tau) * sigma[-1]
        for center in cases.CENTERS:
            clamped = linalg.clamp_singular_values(S, tau, center=center)
            low, high = reference.interval(sigma, 1 + tau, center)
            expected = P * np.clip(sigma, low, high) @ Qh
            assert np.abs(reference.array(clamped) - expected).max() <= CLIPPED[torch.float32] * expected.max()
            assert linalg.condition_number(clamped) <= (1 + tau) * (1 + KAPPA[torch.float32])
            assert torch.equal(linalg.clamp_singular_values(clamped, tau, center=center), clamped)


def test_errors_survive_pickling():
    with pytest.raises(ConditioningError) as raised:
        linalg.clamp_singular_values(torch.zeros(2, 2), 0.1)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is ConditioningError and str(copy) == str(raised.value) and copy.remedy == raised.value.remedy
    assert isinstance(copy, ArithmeticError)


@pytest.mark.parametrize("bound", [1.05, 1.5, 4.0])
def test_a_gram_matrix_proves_only_what_is_so(bound):
    """Of many spectra: what is claimed feasible is, and cores near a multiple of an orthogonal matrix are claimed."""
    claimed = 0
    for seed in cases.SEEDS:
        for width in np.linspace(0, 1.2 * (bound - 1), 12):
            sigma = np.random.default_rng(seed).uniform(1, 1 + width, 24)
            S = tensor(7.0 * cases.with_singular_values(np.sort(sigma)[::-1], seed), torch.float32)
            if surely_feasible((S.mT @ S)[None], torch.tensor([bound]))[0]:
                claimed += 1
                assert reference.condition_number(reference.array(S)) <= bound
    assert claimed >= len(cases.SEEDS)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_autocast_does_not_reach_the_products(tau):
    """In bfloat16 the Gram matrix would be off by a relative 4e-3: κ would exceed, and feasible cores would move."""
    for width, feasible in ((1.2, False), (0.9999, True)):
        S = tensor(cases.with_singular_values(np.linspace(width * (1 + tau), 1, 32), 0), torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            clamped = linalg.clamp_singular_values(S, tau)
        assert linalg.condition_number(clamped) <= (1 + tau) * (1 + KAPPA[torch.float32])
        assert torch.equal(clamped, S) == feasible
