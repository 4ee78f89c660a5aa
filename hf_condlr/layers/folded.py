"""`FoldedLayer`: two matrix products in place of three, for inference."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Self

from torch import Tensor, nn

from hf_condlr.layers.inference import Builders, InferenceLayer, filled, quantized_values


class FoldedLayer(nn.Sequential, InferenceLayer):
    """`down` (Vᵀ) and `up` (U S with the bias), r(m + n) weights: plain torch layers that any exporter knows."""

    form = "folded"

    @classmethod
    def _with_weight(cls, L: Tensor, R: Tensor, bias: nn.Parameter | None, builders: Builders, like: Tensor) -> Self:
        (m, r), (_, build_down, build_up) = L.shape, builders
        down, up = filled(lambda: build_down(r), R, None, like=like), filled(lambda: build_up(r, m), L, bias, like=like)
        return cls(OrderedDict(down=down, up=up))

    def values(self) -> tuple[Tensor, Tensor]:
        """U S (m, r) and Vᵀ (r, n); of quantized layers, what their weights stand for."""
        return quantized_values(self.up).flatten(1), quantized_values(self.down).flatten(1)

    @property
    def bias(self) -> Any:
        """The bias, that of `up`."""
        return self.up.bias
