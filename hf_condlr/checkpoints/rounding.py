"""How far rounding to a file's dtype can move factors that obeyed their bound."""

from __future__ import annotations

import math

import torch

from hf_condlr.distributed.sharded_linalg import orthonormality_error
from hf_condlr.distributed.shards import full_tensor
from hf_condlr.layers import Factors
from hf_condlr.linalg import is_orthonormal, singular_values


@torch.no_grad()
def measure(factors: Factors, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether U and V can be roundings of orthonormal ones, and the least κ of an S that this one can be rounded from.

    With u the unit roundoff, rounding moves each singular value of S by at most u‖S‖_F, and UᵀU by at most 2u√r + u²r
    in the Frobenius norm; u is that of `dtype`, plus the factors' own where it is another.
    """
    U, S, V = factors
    r, u = S.shape[0], sum(torch.finfo(rounded).eps for rounded in {dtype, S.dtype}) / 2
    errors = [orthonormality_error(basis).item() - 2 * u * math.sqrt(r) - u * u * r for basis in (U, V)]
    orthonormal = all(is_orthonormal(error, r) for error in errors)
    S = full_tensor(S).double()
    if not torch.isfinite(S).all():
        return orthonormal, math.inf
    sigma, slack = singular_values(S), u * torch.linalg.vector_norm(S)
    return orthonormal, ((sigma[0] - slack) / (sigma[-1] + slack)).nan_to_num(nan=math.inf).item()
