"""`PivotedLayer`: r rows of W, and what the other rows are made of; the fewest weights that a rank-r matrix has."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_condlr.layers.inference import Builders, InferenceLayer, filled, quantized_values
from hf_condlr.linalg.pivots import pivot_rows
from hf_condlr.linalg.precision import to_float64


class PivotedLayer(InferenceLayer):
    """`down` with r rows W_p of W, and `up` with C, of which the other rows are made: W_q = C W_p, |C_ij| ≤ 2.

    That are r(m + n − r) weights, the dimension of the manifold of (m, n) matrices of rank r: fewer than mn for every
    r < min(m, n), and r² fewer than folded. Outputs are computed in the order p, q and sorted after that. Two products
    and as many multiply-adds a row as weights. (Pivoting factorization: Zhao et al. 2025, arXiv 2501.19090.)

    C enlarges what rounding does to W_p x, so half precisions cost more accuracy than in the other forms.

    Attributes:
        order: (m,), int32: where each output stands among those of `down` and then `up`.
        axis: The dimension of the outputs' features or channels.
    """

    form = "pivoted"
    order: Tensor
    axis: int

    def __init__(self, down: nn.Module, up: nn.Module, bias: nn.Parameter | None, order: Tensor) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.axis = -3 if isinstance(down, nn.Conv2d) else -1
        self.register_parameter("bias", bias)
        self.register_buffer("order", order)

    @classmethod
    def of(cls, L: Tensor, R: Tensor, bias: Any, builders: Builders, *, replaced: nn.Module, like: Tensor) -> Any:
        """As `InferenceLayer.of`; a layer of full rank becomes the dense one, which is as small."""
        if L.shape[1] >= min(len(L), R.shape[1]):
            return filled(builders[0], to_float64(L) @ to_float64(R), bias, like=like).train(replaced.training)
        return super().of(L, R, bias, builders, replaced=replaced, like=like)

    @classmethod
    def _with_weight(cls, L: Tensor, R: Tensor, bias: nn.Parameter | None, builders: Builders, like: Tensor) -> Self:
        """L = Q T by QR, so that the rows are chosen of an orthonormal Q; W_p = Q_p T R and C = Q_q Q_p⁻¹."""
        (m, r), (_, build_down, build_up) = L.shape, builders
        order, C, rows = torch.empty(m, device=L.device), L[r:], R
        if not L.is_meta:  # on the meta device there is nothing to choose by: a checkpoint fills it
            Q, T = torch.linalg.qr(to_float64(L))
            order, C = pivot_rows(Q)
            rows = Q[order[:r]] @ T @ to_float64(R)
        down = filled(lambda: build_down(r), rows, None, like=like)
        up = filled(lambda: build_up(r, m - r), C, None, like=like)
        return cls(down, up, bias, order.argsort().int())

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        z = self.down(x)
        y = torch.cat((z, self.up(z)), self.axis).index_select(self.axis, self.order)
        if self.bias is None:
            return y
        return y + (self.bias if self.axis == -1 else self.bias[:, None, None])

    def values(self) -> tuple[Tensor, Tensor]:
        """L (m, r) and R (r, n) with W = L R; of quantized layers, what their weights stand for."""
        C, rows = quantized_values(self.up).flatten(1), quantized_values(self.down).flatten(1)
        L: Any = torch.cat((torch.eye(len(rows), dtype=C.dtype, device=C.device), C))
        return L[self.order], rows
