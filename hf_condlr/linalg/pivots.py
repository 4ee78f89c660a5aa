"""Rows of a matrix that span all its rows, chosen so that the others are small combinations of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.linalg.precision import to_float64

LARGEST_COEFFICIENT = 2.0


@torch.no_grad()
def pivot_rows(X: Tensor, largest: float = LARGEST_COEFFICIENT) -> tuple[Tensor, Tensor]:
    """r rows p of X (m, r), and the coefficients of the other rows q: X_q = C X_p with |C_ij| ≤ `largest`.

    Rows by Gaussian elimination with partial pivoting; then as long as some |C_ij| is larger, rows q_i and p_j change
    places, which multiplies |det X_p| by |C_ij| (Goreinov et al. 2010, "How to find a good submatrix": maxvol). So it
    ends, and σ_min(X_p) ≥ σ_min(X)/√(1 + r(m − r) `largest`²).

    Args:
        X: Of rank r, such as orthonormal columns; in any floating-point dtype.
        largest: More than 1.

    Returns:
        order (m,), the indices of the rows, those of p first, and C (m − r, r) in float64.
    """
    X = to_float64(X)
    m, r = X.shape
    L, swaps = torch.linalg.lu_factor(X)  # L below the diagonal; as a matrix (m, m) the swaps could be larger than X
    places = list(range(m))
    for i, j in enumerate(swaps.tolist()):  # rows i and j - 1 changed places, one after the other
        places[i], places[j - 1] = places[j - 1], places[i]
    order = torch.tensor(places, device=X.device)
    C = torch.linalg.solve_triangular(L[:r], L[r:], upper=False, left=False, unitriangular=True)
    while C.numel():
        size, index = C.abs().flatten().max(0)
        if not size > largest:
            break
        i, j = divmod(int(index), r)
        row, column, c = C[i].clone(), C[:, j].clone(), C[i, j].clone()
        C.addr_(column, row / c, alpha=-1)
        C[i], C[:, j], C[i, j] = -row / c, column / c, 1 / c
        order[[j, r + i]] = order[[r + i, j]]
    return order, torch.linalg.solve(X[order[:r]], X[order[r:]], left=False)
