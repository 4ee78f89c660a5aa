"""What rounding to a file's dtype can have done to factors that obeyed their bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_condlr.distributed.sharded_linalg import gram_times
from hf_condlr.distributed.shards import full_tensor
from hf_condlr.layers import Factors
from hf_condlr.linalg import singular_values

PROBES = 16
KAPPA_TOLERANCE = 1 + 2e-4  # the step guarantees 1 + 1e-4, and κ is measured once more


@torch.no_grad()
def measure(factors: Factors, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether U and V can be roundings of orthonormal ones, and the least κ of an S that this one can be rounded from.

    With u the unit roundoff of `dtype` and the factors' own, rounding moves each singular value of S by at most u‖S‖_F,
    and UᵀU by at most 2u√r + u²r in the Frobenius norm.
    """
    U, S, V = factors
    r, u = S.shape[0], (torch.finfo(dtype).eps + torch.finfo(S.dtype).eps) / 2
    error = max(_orthonormality_estimate(U), _orthonormality_estimate(V))
    orthonormal = error <= (1e-4 + 2 * u) * math.sqrt(r) + u * u * r
    S = full_tensor(S).double()
    if not torch.isfinite(S).all():
        return orthonormal, math.inf
    sigma, slack = singular_values(S), u * torch.linalg.vector_norm(S)
    return orthonormal, ((sigma[0] - slack) / (sigma[-1] + slack)).nan_to_num(nan=math.inf).item()


def _orthonormality_estimate(U: Tensor) -> float:
    """‖UᵀU − I‖_F from 16 random directions, E‖(UᵀU − I)z‖² = ‖UᵀU − I‖_F²: the whole product is slow at loading."""
    z = torch.randn(U.shape[1], PROBES, generator=torch.Generator().manual_seed(0)).to(U.device)
    return (torch.linalg.vector_norm(gram_times(U, z) - z) / math.sqrt(PROBES)).item()
