"""Linear algebra of matrices of which every process may hold some rows. Every process must call each function.

QR by rows (TSQR) is from Demmel, Grigori, Hoemmen, Langou, *Communication-optimal parallel and sequential QR and LU
factorizations*, 2012.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr import linalg
from hf_condlr.distributed.collectives import Work, finish, sum_over_processes
from hf_condlr.distributed.shards import Rows, full_tensor, local, rows_of
from hf_condlr.linalg.precision import largest_entry, to_float64


def orthonormality_error(U: Tensor) -> Tensor:  # (m, r) -> ()
    """‖UᵀU − I‖_F in float64."""
    rows, own = rows_of(U), local(U)
    if rows.group is None:
        return linalg.orthonormality_error(own)
    own = to_float64(own)
    (gram,) = sum_over_processes(rows, own.mT @ own)
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def is_finite(p: Tensor) -> bool:  # (m, r)
    """Whether every entry is finite."""
    return not sum_over_processes(rows_of(p), torch.isfinite(local(p)).logical_not().sum())[0].item()


def orthonormalize(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (m, r), (r, r), (n, r)
    """Orthonormal factors of the same W: U = Q_U R_U, V = Q_V R_V, W = Q_U (R_U S R_Vᵀ) Q_Vᵀ.

    Returns:
        In float64, this process's rows of Q_U, the full core R_U S R_Vᵀ, and this process's rows of Q_V.
    """
    (Q_U, R_U), (Q_V, R_V) = qr(U), qr(V)
    return Q_U, R_U @ to_float64(full_tensor(S)) @ R_V.mT, Q_V


def qr(U: Tensor) -> tuple[Tensor, Tensor]:  # (m, r) -> (count, r), (r, r)
    """This process's rows of Q, and R, of U = QR in float64."""
    rows, own = rows_of(U), to_float64(local(U))
    if rows.group is None:
        return tuple(torch.linalg.qr(own))
    Q, R, scale = finish(qr_of_rows(own, rows), rows)
    return Q, R * scale


def qr_of_rows(
    own: Tensor, rows: Rows
) -> Work[tuple[Tensor, Tensor, Tensor]]:  # (*, count, r) -> (*, count, r), (*, r, r), (*, 1, 1)
    """TSQR of X = scale · Q R with diag(R) ≥ 0: this process's rows of Q, R and the scale. Exchanges r×r triangles.

    `scale` is max|X|, so that nothing overflows.
    """
    Q, R, scale = scaled_qr(own)
    triangles, scales = yield [rows.beside(R), rows.beside(scale)]
    blocks, R, scale = joined_qr(triangles, scales, rows.heights(R.shape[-1]))
    return Q @ blocks[rows.index], R, scale


def scaled_qr(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*, m, r) -> (*, m, k), (*, r, r), (*, 1, 1)
    """X = scale · Q R of any finite X, with k = min(m, r) and zeros below the k rows of R. X may have no rows."""
    m, r = X.shape[-2:]
    scale = largest_entry(X).to(X.dtype) if m else X.new_ones(*X.shape[:-2], 1, 1)
    Q, R = torch.linalg.qr(X / scale)
    return Q, torch.nn.functional.pad(R, (0, 0, 0, r - R.shape[-2])), scale


def joined_qr(
    R: Tensor, scale: Tensor, heights: list[int]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:  # (N, *, r, r), (N, *, 1, 1), N × k_j
    """One QR of N blocks of rows X_j = scale_j · Q_j R_j from their triangles R_j, of which the first k_j rows count.

    Returns:
        Blocks B_j, (*, k_j, r), so that Q_j B_j are the rows of Q; R of all rows, diag(R) ≥ 0; and its scale.
    """
    largest = scale.amax(0)
    # Without the rows that pad: where X is singular, Q would lie in them.
    stacked = torch.cat([R[j][..., :k, :] * (scale[j] / largest) for j, k in enumerate(heights)], dim=-2)
    Q, joined = torch.linalg.qr(stacked)
    sign = torch.where(joined.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * sign.unsqueeze(-2)).split(heights, dim=-2), joined * sign.unsqueeze(-1), largest
