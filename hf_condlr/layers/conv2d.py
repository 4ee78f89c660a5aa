"""`LowRankConv2d`: a convolution with kernel matrix U S Vᵀ, applied as two convolutions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.errors import ConversionError, require
from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.inference import Builders
from hf_condlr.linalg import Center


class LowRankConv2d(LowRankLayer):
    """A convolution with r filters of size k, the columns of V, and then a 1x1 convolution with U S.

    The kernel (c_out, c_in, k, k) is the matrix W (c_out, c_in·k·k). What `tau` bounds is κ of this matrix, not of the
    convolution as an operator on images. Stride, padding, padding mode and dilation belong to the first; groups is 1.

    Args:
        in_channels: c_in; n = c_in · k_h · k_w.
        out_channels: c_out = m.
        kernel_size: (k_h, k_w) or one number.
        r: Rank, 1 ≤ r ≤ min(m, n).
        stride, padding, dilation, padding_mode, device, dtype: As in `nn.Conv2d`.
        bias: Whether there is a b `(m,)`.
        tau: Conditioning tolerance, κ(S) ≤ 1 + tau under `attach_manifold_step`.
        center: Interval of the conditioning.
    """

    _GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        r: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        tau: float = 0.1,
        center: Center = "nearest",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Conv2d checks the geometry and expands it to tuples; on the meta device it takes no memory.
        dense: Any = nn.Conv2d  # its stubs take padding modes as literals only
        dense = dense(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, False, padding_mode, device="meta"
        )
        shape = tuple(dense.weight.shape)
        super().__init__(out_channels, math.prod(shape[1:]), r, bias, tau, center, device=device, dtype=dtype)
        self.weight_shape = shape
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, dense.kernel_size
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.padding_mode = padding_mode
        if not self.U.is_meta:
            self.reset_parameters()

    @classmethod
    def empty_like(cls, dense: nn.Conv2d, r: int, *, tau: float, center: Center) -> Self:
        """Build the layer that replaces `dense` on the meta device, without values and without a bias."""
        rule, remedy = "only convolutions with groups=1 can be factored", "Leave this one out of target_modules."
        require(dense.groups == 1, rule, received=f"groups={dense.groups}", remedy=remedy, error=ConversionError)
        geometry: dict[str, Any] = {name: getattr(dense, name) for name in cls._GEOMETRY}
        return cls(**geometry, r=r, bias=False, tau=tau, center=center, device="meta", dtype=dense.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H', W')
        """Apply the two convolutions."""
        padding: tuple[int, int] | str | int = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad_amounts(), mode=self.padding_mode), 0
        filters = self.V.mT.reshape(self.r, *self.weight_shape[1:])
        x = F.conv2d(x, filters, None, self.stride, padding, self.dilation)
        return F.conv2d(x, (self.U @ self.S)[..., None, None], self.bias)

    def _pad_amounts(self) -> list[int]:
        """Left, right, top, bottom for `F.pad`; of an odd "same" padding the right side gets more, as in nn.Conv2d."""
        amounts: list[int] = []
        for axis in (1, 0):  # F.pad counts from the last dimension
            if isinstance(self.padding, str):
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [self.padding[axis]] * 2
        return amounts

    def builders(self) -> Builders:
        """What builds the convolution, one with r filters, and a 1x1."""
        geometry = {name: getattr(self, name) for name in self._GEOMETRY}
        convolution = partial(nn.Conv2d, bias=False)

        def down(r: int) -> nn.Conv2d:
            return convolution(**geometry | {"out_channels": r})

        return partial(convolution, **geometry), down, partial(convolution, kernel_size=1)

    def extra_repr(self) -> str:
        """Describe shapes, rank and bound."""
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        extras = f", dilation={self.dilation}, padding_mode={self.padding_mode}"
        return f"{self.in_channels}, {self.out_channels}, {geometry}{extras}, {self.bound_repr()}"
