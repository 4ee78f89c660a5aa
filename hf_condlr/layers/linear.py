"""`LowRankLinear`: a linear layer with weight U S Vᵀ."""

from __future__ import annotations

import math
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.layers.base import LowRankLayer, weight_matrix
from hf_condlr.layers.inference import Builders
from hf_condlr.linalg import Center

# torch 2.6 cannot tell exporting from compiling
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class LowRankLinear(LowRankLayer):
    """x ↦ x V Sᵀ Uᵀ + b, that is W x + b with W = U S Vᵀ, for inputs `(*, in_features)`.

    Args:
        in_features: n.
        out_features: m.
        r: Rank, 1 ≤ r ≤ min(m, n).
        bias: Whether there is a b `(m,)`.
        tau: Conditioning tolerance, κ(S) ≤ 1 + tau under `attach_manifold_step`.
        center: Interval of the conditioning.
        device, dtype: As in `nn.Linear`.
    """

    dense_class: type[nn.Linear] | type[Conv1D] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        bias: bool = True,
        *,
        tau: float = 0.1,
        center: Center = "nearest",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, r, bias, tau, center, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.weight_shape = (out_features, in_features)
        if not self.U.is_meta:
            self.reset_parameters()

    @classmethod
    def empty_like(cls, dense: nn.Linear | Conv1D, r: int, *, tau: float, center: Center) -> Self:
        """Build the layer that replaces `dense` on the meta device, without values and without a bias."""
        W = weight_matrix(dense)
        m, n = W.shape
        layer = cls(n, m, r, False, tau=tau, center=center, device="meta", dtype=W.dtype)
        if isinstance(dense, Conv1D):
            layer.dense_class, layer.weight_shape = Conv1D, (n, m)
        return layer

    def forward(self, x: Tensor) -> Tensor:  # (*, n) -> (*, m)
        """W x + b for each row of x, multiplied in the order that costs least.

        With B rows, ((x V) Sᵀ) Uᵀ takes B r(m + n) + B r² multiplications. Joining S with the smaller basis first,
        (x V)(U S)ᵀ or (x (V Sᵀ)) Uᵀ, takes B r(m + n) + min(m, n) r²; backward takes twice that in each case, and keeps
        one intermediate (B, r) instead of two. So S is joined where B > min(m, n).
        """
        m, n = self.out_features, self.in_features
        rows = math.prod(x.shape[:-1])
        # A traced or exported graph serves every B: rows are a symbol there, or must not become a guard.
        if not isinstance(rows, int) or _is_exporting() or rows <= min(m, n):
            return F.linear(F.linear(F.linear(x, self.V.mT), self.S), self.U, self.bias)
        if m <= n:
            return F.linear(F.linear(x, self.V.mT), self.U @ self.S, self.bias)
        # A product with a transposed small matrix rounds differently by the factors' addresses; a copy does not.
        VS = self.V @ self.S.mT.contiguous()
        return F.linear(F.linear(x, VS.mT), self.U, self.bias)

    def builders(self) -> Builders:
        """What builds a Linear or Conv1D, and two Linear."""
        m, n, linear = self.out_features, self.in_features, partial(nn.Linear, bias=False)
        dense = partial(Conv1D, m, n) if self.dense_class is Conv1D else partial(linear, n, m)
        return dense, partial(linear, n), linear

    def extra_repr(self) -> str:
        """Describe shapes, rank and bound."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.bound_repr()}"
