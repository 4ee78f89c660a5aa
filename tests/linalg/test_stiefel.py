"""Projections on tangent spaces and retractions of the Stiefel manifold, against the float64 reference."""

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from tests.linalg import cases, reference
from tests.linalg.checks import (
    CLOSE,
    REFERENCES,
    RETRACTIONS,
    assert_close,
    assert_orthonormal,
    each_center,
    each_dtype,
    each_retraction,
    each_seed,
    each_shape,
    tensor,
)


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
        project = getattr(linalg, name)
        assert_close(project(U, G), expected, dtype)
        assert torch.equal(project(U[:3], G[:3], U.mT @ G), project(U, G, U.mT @ G)[:3])  # rows, given UᵀG of all


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
        Q, trusted = linalg.retract_cholesky(X)
        assert trusted[2] and not trusted[1]
        assert_close(Q[trusted], reference.array(linalg.retract_qr(X)[trusted]), dtype)


def test_cholesky_retraction_of_a_usual_step_is_trusted():
    for m, r in ((24, 5), (60, 24), (11, 1)):
        U = cases.orthonormal(m, r)
        move = reference.project_horizontal(U, np.random.default_rng(0).standard_normal((m, r)))
        X = tensor(U + 0.5 * move / np.linalg.norm(move, 2), torch.float32)
        Q, trusted = linalg.retract_cholesky(X)
        assert trusted
        assert_orthonormal(Q)


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


def test_near_the_identity_the_factor_is_exact_without_a_decomposition():
    """Orthonormal to 8 eps in the Frobenius norm, besides the rounding of products; refused for a larger step."""
    for dtype, size in ((torch.float32, 2.4e-2), (torch.float64, 1.5e-4)):
        U = cases.orthonormal(60, 24)
        move = reference.project_horizontal(U, np.random.default_rng(0).standard_normal((60, 24)))
        for scale, exact in ((1.0, True), (3.0, False)):
            X = tensor(U + scale * size * move / np.linalg.norm(move), dtype)
            inverse, accurate = linalg.inverse_factor_near_identity(X.mT @ X)
            assert accurate == exact
        X = tensor(U + size * move / np.linalg.norm(move), dtype)
        inverse, _ = linalg.inverse_factor_near_identity(X.mT @ X)
        assert torch.equal(inverse, inverse.tril())
        error = reference.orthonormality_error(reference.array(X @ inverse.mT))
        assert error <= 16 * torch.finfo(dtype).eps
