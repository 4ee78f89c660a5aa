"""The singular value decomposition where LAPACK fails, by an error or by NaN without an error."""

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from hf_condlr.errors import ConvergenceError
from tests.linalg import cases, reference
from tests.linalg.checks import (
    CLOSE,
    RETRACTIONS,
    assert_close,
    assert_kappa_at_most,
    assert_orthonormal,
    core,
    each_dtype,
    each_half,
    each_shape,
    tensor,
)


class Fails:
    """A torch.linalg function that fails on its first `times` calls and keeps its arguments.

    It raises LinAlgError or, if `silently`, returns NaN in the first matrix of a stack.
    """

    def __init__(self, function, times=10**9, silently=False):
        self.function, self.times, self.silently, self.arguments = function, times, silently, []

    def __call__(self, X, **options):
        self.arguments.append(X)
        if len(self.arguments) > self.times:
            return self.function(X, **options)
        if not self.silently:
            raise torch.linalg.LinAlgError("did not converge")
        result = self.function(X, **options)
        broken = result[-1] if isinstance(result, tuple) else result
        broken[(0,) * broken.ndim] = torch.nan
        return result


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
@pytest.mark.parametrize("silently", [False, True])
def test_every_fallback_of_the_svd(monkeypatch, size, dtype, failures, silently):
    X = tensor(np.random.default_rng(0).standard_normal(size), dtype)
    svd = Fails(torch.linalg.svd, failures, silently)
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
    with pytest.raises(ConvergenceError, match=r"converge; received 8 failures on a \(4, 3\) matrix .* = 2\. "):
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
    with pytest.raises(ConvergenceError, match=r"8 failures on a \(6, 6\) matrix with max\|X\| = 0\."):
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


@each_half
def test_half_precision_svd(dtype):
    X = tensor(np.random.default_rng(0).standard_normal((7, 4)), dtype)
    P, sigma, Qh = linalg.robust_svd(X)
    assert P.dtype == sigma.dtype == Qh.dtype == dtype
    error = np.abs(reference.array(P) * reference.array(sigma) @ reference.array(Qh) - reference.array(X)).max()
    assert error <= 4 * torch.finfo(dtype).eps * sigma[0].item()


def test_only_the_matrices_of_a_stack_that_failed_silently_are_repeated(monkeypatch):
    X = tensor(np.random.default_rng(0).standard_normal((3, 6, 4)), torch.float32)
    svd = Fails(torch.linalg.svd, 1, silently=True)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert_is_svd(linalg.robust_svd(X), X)
    assert [tuple(tried.shape) for tried in svd.arguments] == [(3, 6, 4), (6, 4)]
    assert torch.equal(svd.arguments[1], X[0].double())


def test_singular_values_and_eigenvectors_that_are_nan_are_repeated(monkeypatch):
    S = torch.stack([core(name, 6)[0] for name in cases.WELL_POSED])
    expected, clamped = linalg.singular_values(S), linalg.clamp_singular_values(S, 0.5)
    for name in ("svdvals", "eigh"):
        monkeypatch.setattr(torch.linalg, name, Fails(getattr(torch.linalg, name), 1, silently=True))
    torch.testing.assert_close(linalg.singular_values(S), expected)
    torch.testing.assert_close(linalg.clamp_singular_values(S, 0.5), clamped)


def test_the_matrix_of_which_lapack_returns_nan():
    """In float32 on one thread of some CPUs, without an error; κ = 1.02."""
    X = cases.matrix_with_nan_svd()
    assert torch.isfinite(X).all()
    assert_is_svd(tuple(part[None] for part in linalg.robust_svd(X)), X[None])
    assert_close(linalg.retract_polar(X), reference.polar(reference.array(X)), torch.float32)
    assert linalg.condition_number(X).item() == pytest.approx(reference.condition_number(reference.array(X)), rel=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_matrices_that_are_not_finite_are_refused(value):
    X = torch.eye(5, 4)[None].repeat(3, 1, 1)
    X[1, 2, 3] = value
    for function in (linalg.robust_svd, linalg.singular_values, linalg.retract_polar):
        with pytest.raises(ConvergenceError, match=r"a matrix must be finite .*; received NaN or inf in a"):
            function(X)


@pytest.mark.parametrize("kappa", [1.0, 1.1, 40.0, 60.0, 1e8, 1e14])
def test_the_ends_of_the_spectrum_are_those_of_the_svd(kappa):
    """The Gram matrix up to about κ = 40, the SVD beyond: either way to a relative 1e-9."""
    rng = np.random.default_rng(3)
    P, Q = (np.linalg.qr(rng.standard_normal((2, 30, 30)))[0] for _ in range(2))
    S = (P * np.geomspace(kappa, 1, 30)) @ Q.swapaxes(1, 2) * np.array([1e-30, 1e30])[:, None, None]
    expected = np.linalg.svd(S, compute_uv=False)
    largest, least = linalg.singular_value_range(tensor(S))
    np.testing.assert_allclose(reference.array(largest), expected[:, 0], rtol=1e-9)
    np.testing.assert_allclose(reference.array(least), expected[:, -1], rtol=max(1e-9, 1e-15 * kappa))


@pytest.mark.parametrize("silently", [False, True])
def test_the_ends_of_the_spectrum_survive_a_failure_of_eigvalsh(monkeypatch, silently):
    S = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "eigvalsh", Fails(torch.linalg.eigvalsh, silently=silently))
    largest, least = linalg.singular_value_range(S)
    expected = reference.singular_values(reference.array(S))
    np.testing.assert_allclose([largest.item(), least.item()], [expected[0], expected[-1]], rtol=1e-6)
