"""Linear algebra of factors of which every process may hold some rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr import linalg
from hf_condlr.distributed.collectives import sum_over_processes
from hf_condlr.distributed.rows import local, rows_of, whole


def orthonormality_error(U: Tensor) -> Tensor:  # (m, r) -> ()
    """‖UᵀU − I‖_F in float64, of whole or sharded bases; every process must ask."""
    rows, own = rows_of(U), local(U)
    if rows.group is None:
        return linalg.orthonormality_error(own)
    own = _wide(own)
    (gram,) = sum_over_processes(rows, own.mT @ own)
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def gram_times(U: Tensor, Z: Tensor) -> Tensor:  # (m, r), (r, k) -> (r, k)
    """UᵀU Z; every process must ask."""
    own = local(U).to(Z.dtype)
    return sum_over_processes(rows_of(U), own.mT @ (own @ Z))[0]


def is_finite(p: Tensor) -> bool:  # (m, r)
    """Whether every entry is, on all processes, which must all ask."""
    return not sum_over_processes(rows_of(p), torch.isfinite(local(p)).logical_not().sum())[0].item()


def qr(U: Tensor) -> tuple[Tensor, Tensor]:  # (m, r) -> (count, r), (r, r)
    """The own rows of Q, and R, of U = QR in float64; of sharded bases by TSQR, which gathers r×r blocks."""
    rows, own = rows_of(U), _wide(local(U))
    if rows.group is None:
        return tuple(torch.linalg.qr(own))
    Q, R, scale = linalg.scaled_qr(own)
    gathered = sum_over_processes(rows, rows.beside(R), rows.beside(scale))
    blocks, R, scale = linalg.joined_qr(gathered[0], gathered[1], rows.heights(R.shape[-1]))
    return Q @ blocks[rows.index], R * scale


def orthonormalize(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (m, r), (r, r), (n, r)
    """As `linalg.orthonormalize`, in float64: the own rows of Q_U, the whole core R_U S R_Vᵀ, the own rows of Q_V."""
    (Q_U, R_U), (Q_V, R_V) = qr(U), qr(V)
    return Q_U, R_U @ _wide(whole(S)) @ R_V.mT, Q_V


def _wide(X: Tensor) -> Tensor:
    return X.to(device=linalg.wide_device(X), dtype=torch.float64)
