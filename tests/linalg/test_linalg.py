"""`hf_condlr.linalg` against the float64 reference, over every shape, dtype, seed and nasty core of `cases`."""

import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from hf_condlr.errors import ConditioningError, ConfigError, ConvergenceError
from tests.linalg import cases, reference

RETRACTIONS = {"qr": linalg.retract_qr, "cholesky": linalg.retract_cholesky, "polar": linalg.retract_polar}
REFERENCES = {"qr": reference.qr, "cholesky": reference.qr, "polar": reference.polar}
# Relative to the largest entry; measured: float32 9e-7, float64 5e-15.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Clipped singular values relative to the largest; measured: float32 1.1e-6, float64 9e-12 (from a Gram matrix).
CLIPPED = {torch.float32: 1e-5, torch.float64: 1e-9}
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
    """The core rounded to `dtype`, and what it then is in float64."""
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


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()


@pytest.fixture(autouse=True)
def global_random_state_untouched(request):
    before = random_states()
    yield
    assert random_states() == before or "random_factors" in request.node.name


# ----------------------------------------------------------------------------------------------- tangent spaces


@each_shape
@each_dtype
@each_seed
def test_projections_equal_the_formulas(shape, dtype, seed):
    m, n, r = shape
    U, _, _ = cases.factors(m, n, r, seed)
    U = tensor(U, dtype)
    G = tensor(np.random.default_rng(seed).standard_normal((m, r)), dtype)
    for name in ("project_horizontal", "project_tangent"):
        expected = getattr(reference, name)(reference.array(U), reference.array(G))
        assert_close(getattr(linalg, name)(U, G), expected, dtype)


@each_shape
@each_seed
def test_projections_are_orthogonal_projections_on_their_spaces(shape, seed):
    m, n, r = shape
    U = tensor(cases.factors(m, n, r, seed)[0])
    G = tensor(np.random.default_rng(seed).standard_normal((m, r)))
    H, T = linalg.project_horizontal(U, G), linalg.project_tangent(U, G)
    assert (U.mT @ H).abs().max() < 1e-14  # horizontal: UᵀH = 0
    A = U.mT @ T
    assert (A + A.mT).abs().max() < 1e-14  # tangent: UᵀT skew
    for project, X in ((linalg.project_horizontal, H), (linalg.project_tangent, T)):
        torch.testing.assert_close(project(U, X), X, rtol=0, atol=1e-13)
        assert abs(((G - X) * X).sum()) < 1e-13  # the rest is orthogonal to the space


def test_horizontal_projection_in_place_of_the_tangent_one_drops_the_rotation_only():
    U = tensor(cases.orthonormal(9, 4))
    G = tensor(np.random.default_rng(0).standard_normal((9, 4)))
    A = U.mT @ G
    rotation = U @ ((A - A.mT) / 2)
    torch.testing.assert_close(linalg.project_tangent(U, G) - linalg.project_horizontal(U, G), rotation)


@each_shape
@each_dtype
def test_orthonormality_error_equals_the_formula(shape, dtype):
    X = tensor(np.random.default_rng(0).standard_normal(shape[::2]), dtype)
    assert_close(linalg.orthonormality_error(X), reference.orthonormality_error(reference.array(X)))


# ------------------------------------------------------------------------------------------------- retractions


@each_retraction
@each_shape
@each_dtype
@pytest.mark.parametrize("step", [0.0, 1e-3, 0.3, 3.0])
def test_retractions_equal_the_reference(name, shape, dtype, step):
    m, n, r = shape
    for seed in cases.SEEDS:
        U = cases.factors(m, n, r, seed)[0]
        move = reference.project_horizontal(U, np.random.default_rng(seed).standard_normal((m, r)))
        X = tensor(U + step * move, dtype)
        retracted = RETRACTIONS[name](X)
        assert_close(retracted, REFERENCES[name](reference.array(X)), dtype)
        assert_orthonormal(retracted)


@each_retraction
@each_shape
@each_dtype
@pytest.mark.parametrize("scale", [1e30, 1e-18, 1e-20, 1e-22, 1e-30])
def test_retractions_do_not_depend_on_the_scale(name, shape, dtype, scale):
    X = tensor(scale * np.random.default_rng(0).standard_normal(shape[::2]), dtype)
    retracted = RETRACTIONS[name](X)
    assert_orthonormal(retracted)
    # Compared by span: a square root or a triangle of a generic X is less well determined than its span.
    gap = reference.projector(reference.array(retracted)) - reference.projector(reference.polar(reference.array(X)))
    assert np.abs(gap).max() < 100 * CLOSE[dtype]


@each_retraction
def test_retractions_survive_the_largest_floats(name):
    X = tensor(np.random.default_rng(0).uniform(-1, 1, (40, 8)), torch.float32) * 3e38
    assert_orthonormal(RETRACTIONS[name](X))


@each_retraction
@each_dtype
def test_retractions_of_singular_matrices_are_orthonormal(name, dtype):
    rng = np.random.default_rng(0)
    twice = rng.standard_normal((12, 5))
    twice[:, 3] = twice[:, 1]
    hole = rng.standard_normal((12, 5))
    hole[:, 2] = 0
    for X in (np.zeros((12, 5)), np.ones((12, 5)), twice, hole, np.outer(rng.standard_normal(12), np.ones(5))):
        assert_orthonormal(RETRACTIONS[name](tensor(X, dtype)))


@each_retraction
@each_dtype
@pytest.mark.parametrize("kappa", [2, 5, 10, 1e2, 1e3, 1e4, 1e6, 1e8, 1e12])
def test_retractions_of_ill_conditioned_matrices_are_orthonormal(name, dtype, kappa):
    for seed in cases.SEEDS:
        core = cases.with_singular_values(np.geomspace(kappa, 1, 8), seed)
        assert_orthonormal(RETRACTIONS[name](tensor(cases.orthonormal(40, 8, seed) @ core, dtype)))


@each_retraction
@each_shape
def test_retractions_keep_a_point_of_the_manifold(name, shape):
    m, n, r = shape
    U = tensor(cases.factors(m, n, r)[0])
    torch.testing.assert_close(RETRACTIONS[name](U), U, rtol=0, atol=1e-14)


def test_cholesky_retraction_is_the_qr_retraction():
    rng = np.random.default_rng(0)
    rank_one = np.outer(rng.standard_normal(12), np.ones(5))
    stack = np.stack(
        [rng.standard_normal((12, 5)), rank_one, cases.orthonormal(12, 5), 1e25 * cases.orthonormal(12, 5)]
    )
    for dtype in cases.DTYPES.values():
        X = tensor(stack, dtype)
        assert_close(linalg.retract_cholesky(X)[[0, 2, 3]], reference.array(linalg.retract_qr(X)[[0, 2, 3]]), dtype)
        torch.testing.assert_close(linalg.retract_cholesky(X)[1], linalg.retract_qr(X)[1])


def test_cholesky_retraction_of_a_usual_step_needs_no_householder(monkeypatch):
    monkeypatch.setattr(linalg, "retract_qr", lambda X: pytest.fail("Householder for a small step"))
    for m, r in ((24, 5), (60, 24), (11, 1)):
        U = cases.orthonormal(m, r)
        move = reference.project_horizontal(U, np.random.default_rng(0).standard_normal((m, r)))
        X = tensor(U + 0.5 * move / np.linalg.norm(move, 2), torch.float32)
        assert_orthonormal(linalg.retract_cholesky(X))


def slope(t, errors):
    return np.polyfit(np.log(t), np.log(errors), 1)[0]


def test_polar_is_a_second_order_retraction_and_the_others_are_of_first_order():
    """Along a tangent ξ the geodesic is U + tξ − (t²/2) U ξᵀξ + O(t³): its acceleration is normal.

    (U + tξ)ᵀ(U + tξ) = I + t²ξᵀξ for every tangent ξ. So the polar factor agrees up to O(t³). QR divides by the
    transposed Cholesky factor I + t² up(ξᵀξ) instead, `up` the upper triangle with half the diagonal: off by O(t²).
    """
    t = 2.0 ** -np.arange(4, 9)
    for seed in cases.SEEDS:
        U = cases.orthonormal(9, 4, seed)
        xi = reference.project_tangent(U, np.random.default_rng(seed).standard_normal((9, 4)))
        xi /= np.linalg.norm(xi)
        A = xi.T @ xi
        for name, retract in RETRACTIONS.items():
            paths = [reference.array(retract(tensor(U + s * xi))) for s in t]
            first = [np.linalg.norm(path - U - s * xi) for s, path in zip(t, paths, strict=True)]
            second = [np.linalg.norm(p - U - s * xi + s**2 / 2 * U @ A) for s, p in zip(t, paths, strict=True)]
            assert slope(t, first) == pytest.approx(2, abs=0.02)  # measured: 2.0002
            assert slope(t, second) == pytest.approx(3 if name == "polar" else 2, abs=0.05)  # measured: 3.0003, 2.003
            if name != "polar":
                up = np.triu(A, 1) + np.diag(np.diag(A)) / 2
                np.testing.assert_allclose((paths[-1] - U - t[-1] * xi) / t[-1] ** 2, -U @ up, atol=2 * t[-1])


def test_polar_follows_the_geodesic_to_third_order():
    """A horizontal ξ = PΣQᵀ has the geodesic U Q cos(tΣ) Qᵀ + P sin(tΣ) Qᵀ; the polar retraction is at arctan(tΣ)."""
    t = 2.0 ** -np.arange(3, 8)
    U = cases.orthonormal(9, 4)
    xi = reference.project_horizontal(U, np.random.default_rng(0).standard_normal((9, 4)))
    P, sigma, Qh = np.linalg.svd(xi / np.linalg.norm(xi), full_matrices=False)
    xi = P * sigma @ Qh

    def geodesic(angle):
        return U @ Qh.T * np.cos(angle) @ Qh + P * np.sin(angle) @ Qh

    distances = {name: [] for name in RETRACTIONS}
    for s in t:
        for name, retract in RETRACTIONS.items():
            distances[name].append(np.linalg.norm(reference.array(retract(tensor(U + s * xi))) - geodesic(s * sigma)))
        arrived = reference.array(linalg.retract_polar(tensor(U + s * xi)))
        np.testing.assert_allclose(arrived, geodesic(np.arctan(s * sigma)), atol=1e-14)
    slopes = {name: slope(t, distance) for name, distance in distances.items()}
    assert slopes == pytest.approx({"polar": 3, "qr": 2, "cholesky": 2}, abs=0.05)


def test_retractions_of_horizontal_steps_share_their_span():
    U = cases.orthonormal(9, 4)
    move = reference.project_horizontal(U, np.random.default_rng(0).standard_normal((9, 4)))
    expected = reference.projector(reference.polar(U + move))
    for retract in RETRACTIONS.values():
        np.testing.assert_allclose(
            reference.projector(reference.array(retract(tensor(U + move)))), expected, atol=1e-13
        )


@each_shape
@each_dtype
def test_orthonormalize_keeps_the_weight(shape, dtype):
    m, n, r = shape
    rng = np.random.default_rng(0)
    U, S, V = (tensor(rng.standard_normal(size), dtype) for size in ((m, r), (r, r), (n, r)))
    for scale in (1, 1e10, 1e-10):
        Q_U, core, Q_V = linalg.orthonormalize(scale * U, S, scale * V)
        assert_orthonormal(Q_U)
        assert_orthonormal(Q_V)
        W = reference.array(scale * U) @ reference.array(S) @ reference.array(scale * V).T
        product = reference.array(Q_U) @ reference.array(core) @ reference.array(Q_V).T
        assert np.abs(product - W).max() <= CLOSE[dtype] * np.abs(W).max()


@each_shape
@each_center
def test_projection_retraction_and_conditioning_make_the_manifold_step(shape, center):
    m, n, r = shape
    U, S, V = cases.factors(m, n, r)
    rng = np.random.default_rng(1)
    U_new, S_new, V_new = (X + 0.3 * rng.standard_normal(X.shape) for X in (U, S, V))
    for name in RETRACTIONS:
        stepped = [
            RETRACTIONS[name](tensor(X) + linalg.project_horizontal(tensor(X), tensor(X_new - X)))
            for X, X_new in ((U, U_new), (V, V_new))
        ]
        stepped.insert(1, linalg.clamp_singular_values(tensor(S_new), 0.5, center=center))
        expected = reference.manifold_step(U, S, V, U_new, S_new, V_new, 1.5, center, REFERENCES[name])
        for one, other in zip(stepped, expected, strict=True):
            assert_close(one, other)


# --------------------------------------------------------------------------------------------------- conditioning


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


def test_errors_survive_pickling():
    with pytest.raises(ConditioningError) as raised:
        linalg.clamp_singular_values(torch.zeros(2, 2), 0.1)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is ConditioningError and str(copy) == str(raised.value) and copy.remedy == raised.value.remedy
    assert isinstance(copy, ArithmeticError)


# ------------------------------------------------------------------------------------- LAPACK that does not converge


class Fails:
    """A torch.linalg function that raises LinAlgError on its first `times` calls and keeps its arguments."""

    def __init__(self, function, times=10**9):
        self.function, self.times, self.arguments = function, times, []

    def __call__(self, X, **options):
        self.arguments.append(X)
        if len(self.arguments) <= self.times:
            raise torch.linalg.LinAlgError("did not converge")
        return self.function(X, **options)


def assert_is_svd(triple, X):
    P, sigma, Qh = triple
    for part in triple:
        assert part.dtype == X.dtype
    m, n = X.shape[-2:]
    assert P.shape[-2:] == (m, min(m, n)) and Qh.shape[-2:] == (min(m, n), n)
    stacks = X.flatten(0, -3), P.flatten(0, -3), sigma.flatten(0, -2), Qh.flatten(0, -3)
    for one, P_, sigma_, Qh_ in zip(*stacks, strict=True):
        assert_orthonormal(P_)
        assert_orthonormal(Qh_.mT)
        exact = reference.array(one)
        expected = reference.singular_values(exact)
        tolerance = CLOSE[X.dtype] * expected[0]
        np.testing.assert_allclose(reference.array(sigma_), expected, rtol=0, atol=tolerance)
        product = reference.array(P_) * reference.array(sigma_) @ reference.array(Qh_)
        np.testing.assert_allclose(product, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5), (6, 1), (1, 6), (1, 1)])
@each_dtype
@pytest.mark.parametrize("failures", range(9))
def test_every_fallback_of_the_svd(monkeypatch, size, dtype, failures):
    X = tensor(np.random.default_rng(0).standard_normal(size), dtype)
    svd = Fails(torch.linalg.svd, failures)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert_is_svd(tuple(part[None] for part in linalg.robust_svd(X)), X[None])
    assert len(svd.arguments) == failures + 1
    tall = X if size[0] >= size[1] else X.mT
    expected = (X, tall.double(), tall.double().mT)  # as it is, in float64, transposed
    for tried, one in zip(svd.arguments, expected, strict=False):
        assert tried.dtype == one.dtype and torch.equal(tried, one)
    for number, tried in enumerate(svd.arguments[3:], start=3):  # each rotation is a new problem, same singular values
        assert tried.dtype == torch.float64
        np.testing.assert_allclose(*(reference.singular_values(reference.array(Y)) for Y in (tried, X)), rtol=1e-12)
        assert max(size) == 1 or size[0] == 1 or size[1] == 1 or not torch.equal(tried, svd.arguments[number - 1])


def test_the_svd_gives_up_in_the_end(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", Fails(torch.linalg.svd, 9))
    with pytest.raises(ConvergenceError, match=r"converge; received 8 failures on a \(4, 3\) matrix .* = 2\. Check"):
        linalg.robust_svd(2 * torch.ones(4, 3))


def test_a_stack_whose_svd_fails_is_done_matrix_by_matrix(monkeypatch):
    X = tensor(np.random.default_rng(0).standard_normal((2, 3, 6, 4)))
    svd = Fails(torch.linalg.svd, 2)  # the stack, and its first matrix in float64
    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert_is_svd(linalg.robust_svd(X), X)
    assert [tuple(tried.shape) for tried in svd.arguments] == [(2, 3, 6, 4), (6, 4), (4, 6)] + 5 * [(6, 4)]


def test_a_failing_eigh_is_replaced_by_the_svd(monkeypatch):
    S = torch.stack([core(name, 6)[0] for name in cases.CORES])
    expected = linalg.clamp_singular_values(S, 0.5)
    eigh = Fails(torch.linalg.eigh)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "svd", Fails(torch.linalg.svd, 1))
    clamped = linalg.clamp_singular_values(S, 0.5)
    assert len(eigh.arguments) == 1
    for name, one, other, alone in zip(cases.CORES, clamped, expected, S, strict=True):
        assert torch.equal(one, alone) == torch.equal(other, alone)
        assert_kappa_at_most(one, 1.5)
        if name in cases.WELL_POSED:
            assert_close(one, reference.condition(reference.array(alone), 1.5))
    monkeypatch.setattr(torch.linalg, "svd", Fails(torch.linalg.svd))
    with pytest.raises(ConvergenceError, match=r"8 failures on a \(6, 6\) matrix with max\|X\| = 1\."):
        linalg.clamp_singular_values(S, 0.5)


def test_failing_singular_values_are_replaced_by_the_svd(monkeypatch):
    S = torch.stack([core(name, 6)[0] for name in cases.CORES])
    svdvals = Fails(torch.linalg.svdvals)
    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    for sigma, one in zip(linalg.singular_values(S), S, strict=True):
        expected = reference.singular_values(reference.array(one))
        np.testing.assert_allclose(sigma.numpy(), expected, rtol=1e-12, atol=1e-14 * expected[0])
    assert svdvals.arguments


def test_polar_and_truncated_svd_survive_a_failing_svd(monkeypatch):
    X = tensor(np.random.default_rng(0).standard_normal((9, 4)), torch.float32)
    monkeypatch.setattr(torch.linalg, "svd", Fails(torch.linalg.svd, 3))
    assert_close(linalg.retract_polar(X), reference.polar(reference.array(X)), torch.float32)
    monkeypatch.setattr(torch.linalg, "svd", Fails(torch.linalg.svd, 3))
    U, S, V = linalg.truncated_svd(X, 4)
    assert_close(U @ S @ V.mT, reference.array(X), torch.float32)


@pytest.fixture(scope="module")
def hard():
    """The core on which LAPACK fails in float32, and its float64 decomposition P, σ, Qᵀ."""
    S = cases.core_without_svd()
    return S, *np.linalg.svd(reference.array(S))


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
            assert_close(clamped, P * np.clip(sigma, low, high) @ Qh, torch.float32)
            assert linalg.condition_number(clamped) <= (1 + tau) * (1 + KAPPA[torch.float32])
            assert torch.equal(linalg.clamp_singular_values(clamped, tau, center=center), clamped)


def test_the_core_on_which_lapack_fails_is_decomposed_retracted_and_truncated(hard):
    S, P, sigma, Qh = hard
    assert_is_svd(tuple(part[None] for part in linalg.robust_svd(S)), S[None])
    retracted = {name: retract(S) for name, retract in RETRACTIONS.items()}
    assert_close(retracted["polar"], P @ Qh, torch.float32)
    for Q in retracted.values():
        assert_orthonormal(Q)
    for name in ("qr", "cholesky"):
        R = retracted[name].double().mT @ S.double()  # upper triangular with a positive diagonal: that defines Q
        assert R.tril(-1).abs().max() < 1e-5 and (R.diagonal() > 0).all()
    U, core, V = linalg.truncated_svd(S, 50)
    error = torch.linalg.matrix_norm(S.double() - U.double() @ core.double() @ V.double().mT)
    assert error.item() == pytest.approx(np.linalg.norm(sigma[50:]), rel=1e-5)
    assert (U.mT @ linalg.project_horizontal(U, S[:, :50])).abs().max() < 1e-5
    Q_U, core, Q_V = linalg.orthonormalize(S, S, S)
    assert_orthonormal(Q_U)
    W = S.double() @ S.double() @ S.double().mT
    product = Q_U.double() @ core.double() @ Q_V.double().mT
    torch.testing.assert_close(product, W, rtol=0, atol=1e-5 * W.abs().max().item())


# ---------------------------------------------------------------------------------------------- factorisations


@each_shape
@each_dtype
def test_truncation_error_is_the_tail_of_the_spectrum(shape, dtype):
    m, n, r = shape
    W = tensor(np.random.default_rng(0).standard_normal((m, n)), dtype)
    U, S, V = linalg.truncated_svd(W, r)
    assert (U.shape, S.shape, V.shape) == ((m, r), (r, r), (n, r))
    assert_orthonormal(U)
    assert_orthonormal(V)
    sigma = reference.singular_values(reference.array(W))
    assert torch.equal(S, torch.diag(S.diagonal()))
    np.testing.assert_allclose(S.diagonal().numpy(), sigma[:r], rtol=CLOSE[dtype])
    error = np.linalg.norm(reference.array(W) - reference.array(U) @ reference.array(S) @ reference.array(V).T)
    assert error == pytest.approx(np.linalg.norm(sigma[r:]), abs=CLOSE[dtype] * sigma[0])


@pytest.mark.parametrize("dtype", [*cases.DTYPES.values(), *cases.HALF_DTYPES.values()], ids=str)
def test_random_factors(dtype):
    for m, n, r in cases.SHAPES.values():
        torch.manual_seed(0)
        U, S, V = linalg.random_factors(m, n, r, 0.25, dtype=dtype, device=torch.device("cpu"))
        assert (U.shape, S.shape, V.shape) == ((m, r), (r, r), (n, r))
        for factor in (U, S / 0.25, V):
            assert factor.dtype == dtype
            assert_orthonormal(factor)
        torch.manual_seed(0)  # the global random state decides
        again = linalg.random_factors(m, n, r, 0.25, dtype=dtype, device=torch.device("cpu"))
        assert all(torch.equal(one, other) for one, other in zip((U, S, V), again, strict=True))
        if r > 1:
            other = linalg.random_factors(m, n, r, 0.25, dtype=dtype, device=torch.device("cpu"))
            assert not torch.equal(U, other[0])


# ------------------------------------------------------------------------------------------- stacks and precision


def test_stacks_equal_their_members():
    rng = np.random.default_rng(0)
    U = tensor(np.stack([[cases.orthonormal(11, 4, 3 * i + j) for j in range(3)] for i in range(2)]))
    X = tensor(rng.standard_normal((2, 3, 11, 4)))
    S = tensor(rng.standard_normal((2, 3, 4, 4)))
    S[0, 0] = 0.5 * torch.eye(4)  # feasible among those that are not
    X[1, 2, :, 1] = X[1, 2, :, 0]  # singular among those that are not, in Cholesky-QR
    regular = [(i, j) for i in range(2) for j in range(3) if (i, j) != (1, 2)]
    functions = [
        (linalg.project_horizontal, (U, X)),
        (linalg.project_tangent, (U, X)),
        (linalg.orthonormality_error, (X,)),
        (linalg.retract_qr, (X,)),
        (linalg.retract_cholesky, (X,)),
        (linalg.retract_polar, (X,)),
        (linalg.orthonormalize, (X, S, X.flip(1))),
        (linalg.singular_values, (S,)),
        (linalg.condition_number, (S,)),
        (linalg.is_conditionable, (S,)),
        *((partial(linalg.clamp_singular_values, tau=0.5, center=center), (S,)) for center in cases.CENTERS),
        (linalg.robust_svd, (X,)),
    ]
    for function, arguments in functions:
        before = [argument.clone() for argument in arguments]
        stacked = function(*arguments)
        transposed = function(*(argument.mT.contiguous().mT for argument in arguments))  # another memory layout
        for argument, copy in zip(arguments, before, strict=True):
            assert torch.equal(argument, copy), f"{function} changed its input"
        for i, j in regular:
            alone = function(*(argument[i, j] for argument in arguments))
            parts = (x if isinstance(x, tuple) else (x,) for x in (stacked, alone, transposed))
            for one, other, third in zip(*parts, strict=True):
                torch.testing.assert_close(one[i, j], other, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(third[i, j], other, rtol=1e-11, atol=1e-12)


def test_empty_stacks_stay_empty():
    X, S = torch.zeros(0, 6, 3), torch.zeros(0, 3, 3)
    for retract in RETRACTIONS.values():
        assert retract(X).shape == X.shape
    assert linalg.clamp_singular_values(S, 0.1).shape == S.shape
    assert linalg.condition_number(S).shape == (0,)


@each_half
@each_shape
def test_half_precision_is_computed_in_float32_and_given_back(dtype, shape):
    m, n, r = shape
    rng = np.random.default_rng(0)
    U, V = (tensor(cases.orthonormal(size, r), dtype) for size in (m, n))
    G = tensor(rng.standard_normal((m, r)), dtype)
    S, W = tensor(rng.standard_normal((r, r)), dtype), tensor(rng.standard_normal((m, n)), dtype)
    exact = reference.array(G)
    expected = {
        linalg.retract_qr: reference.qr(exact),
        linalg.retract_cholesky: reference.qr(exact),
        linalg.retract_polar: reference.polar(exact),
        partial(linalg.project_horizontal, U): reference.project_horizontal(reference.array(U), exact),
        partial(linalg.project_tangent, U): reference.project_tangent(reference.array(U), exact),
    }
    for function, value in expected.items():
        result = function(G)
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * np.abs(value) + 1e-5 * np.abs(value).max()
        assert (np.abs(reference.array(result) - value) <= rounding).all()
    for factor in (*linalg.orthonormalize(G, S, V), *linalg.truncated_svd(W, r)):
        assert factor.dtype == dtype
    assert linalg.singular_values(S).dtype == linalg.condition_number(S).dtype == torch.float64
    kappa = reference.condition_number(reference.array(S))
    assert linalg.condition_number(S).item() == pytest.approx(kappa, rel=1e-10)


@each_half
def test_half_precision_svd(dtype):
    X = tensor(np.random.default_rng(0).standard_normal((7, 4)), dtype)
    P, sigma, Qh = linalg.robust_svd(X)
    assert P.dtype == sigma.dtype == Qh.dtype == dtype
    error = np.abs(reference.array(P) * reference.array(sigma) @ reference.array(Qh) - reference.array(X)).max()
    assert error <= 4 * torch.finfo(dtype).eps * sigma[0].item()


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
