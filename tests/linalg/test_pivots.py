"""Rows that span the others, with small coefficients."""

import itertools

import pytest
import torch

from hf_condlr.linalg.pivots import pivot_rows


def orthonormal(m, r, dtype=torch.float64):
    X = torch.randn(m, r, dtype=torch.float64, generator=torch.Generator().manual_seed(m + r))
    return torch.linalg.qr(X)[0].to(dtype)


@pytest.mark.parametrize(("m", "r"), [(1, 1), (7, 1), (7, 3), (6, 6), (60, 25), (200, 190)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_other_rows_are_small_combinations(m, r, dtype):
    X = orthonormal(m, r, dtype)
    order, C = pivot_rows(X)
    rows = X.double()[order]
    assert sorted(order.tolist()) == list(range(m))
    assert C.shape == (m - r, r) and C.dtype == torch.float64
    assert torch.allclose(C @ rows[:r], rows[r:], rtol=0, atol=1e-12)
    assert not C.numel() or C.abs().max() <= 2
    least = torch.linalg.svdvals(X.double())[-1] / (1 + 4 * r * (m - r)) ** 0.5
    assert torch.linalg.svdvals(rows[:r])[-1] >= least * (1 - 1e-9)


def test_a_matrix_for_which_elimination_alone_fails():
    """Wilkinson's: partial pivoting takes its rows as they are, and coefficients grow as powers of 2."""
    r = 20
    X = torch.eye(r, dtype=torch.float64) - torch.ones(r, r, dtype=torch.float64).tril(-1)
    X = torch.cat((X, torch.full((1, r), -0.9, dtype=torch.float64)))
    _, L, _ = torch.linalg.lu(X)
    assert torch.linalg.solve(L[:r], L[r:], left=False).abs().max() > 1000
    order, C = pivot_rows(X)
    assert C.abs().max() <= 2
    assert torch.allclose(C @ X[order[:r]], X[order[r:]], rtol=0, atol=1e-9)


def test_the_smaller_the_bound_the_larger_the_volume():
    """With a bound near 1 no single change of rows makes |det X_p| larger."""
    X = orthonormal(12, 4)
    order, _ = pivot_rows(X, largest=1.0 + 1e-12)
    volume = X[order[:4]].det().abs()
    for i, j in itertools.product(range(4), range(4, 12)):
        other = order.clone()
        other[i], other[j] = order[j], order[i]
        assert X[other[:4]].det().abs() <= volume * (1 + 1e-9)


def test_the_same_rows_every_time():
    X = orthonormal(50, 20)
    assert torch.equal(pivot_rows(X)[0], pivot_rows(X.clone())[0])
