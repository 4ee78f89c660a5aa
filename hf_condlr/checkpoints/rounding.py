"""Whether factors in a file can be the rounding of factors that obeyed the constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_condlr.distributed.sharded_linalg import orthonormality_error
from hf_condlr.distributed.shards import full_tensor, local, rows_of
from hf_condlr.linalg import full_precision, is_orthonormal, singular_value_range


@torch.no_grad()
def can_be_orthonormal(U: Tensor, dtype: torch.dtype) -> bool:  # (m, r)
    """Whether U can be the rounding to `dtype`, and to its own dtype, of a basis within the guarantee's tolerance.

    With u the unit roundoff, rounding moves UᵀU by at most 2u√r + u²r in the Frobenius norm. False if U is not finite.
    Every process must call it for a sharded U.
    """
    r, u = U.shape[1], _roundoff(dtype, U.dtype)
    slack = 2 * u * math.sqrt(r) + u * u * r
    if rows_of(U).group is None:
        # A Gram matrix in float32 costs a quarter of one in float64. Its own rounding, about 1e-8 in each of the r²
        # entries, is far below half of the tolerance, 5e-6 √r.
        with full_precision():
            X = local(U).float()
            gram = X.mT @ X
        gram.diagonal().sub_(1)
        if is_orthonormal(2 * torch.linalg.matrix_norm(gram).item(), r):
            return True
    return is_orthonormal(orthonormality_error(U).item() - slack, r)


@torch.no_grad()
def least_condition_number(S: Tensor, dtype: torch.dtype) -> float:  # (r, r)
    """The least κ of a core that rounds to S in `dtype`; inf if S is not finite.

    Rounding moves each singular value by at most u‖S‖_F.
    """
    u, S = _roundoff(dtype, S.dtype), full_tensor(S).double()
    if not torch.isfinite(S).all():
        return math.inf
    largest, least = singular_value_range(S)
    slack = u * torch.linalg.vector_norm(S)
    return ((largest - slack) / (least + slack)).nan_to_num(nan=math.inf).item()


def _roundoff(*dtypes: torch.dtype) -> float:
    """The unit roundoff of every distinct dtype that a value was rounded to, added up."""
    return sum(torch.finfo(dtype).eps for dtype in set(dtypes)) / 2
