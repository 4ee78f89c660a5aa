"""A layer folded for inference: two matrix products in place of three."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.weight_stand_in import stand_in
from hf_condlr.linalg.precision import to_float64


class FoldedLayer(nn.Sequential):
    """`down` (Vᵀ) and `up` (U S with the bias), plain torch layers that any exporter knows."""

    up: Any
    weight_shape: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LowRankLayer, down: Any, up: Any) -> FoldedLayer:
        """Build the folded form of `layer` from two dense layers without values, which are filled."""
        US = to_float64(layer.U) @ to_float64(layer.S)
        down.weight.copy_(layer.V.mT.reshape(down.weight.shape))
        up.weight.copy_(US.reshape(up.weight.shape))
        up.bias = layer.bias  # the same parameter, as in `to_dense`
        folded = cls(OrderedDict(down=down, up=up)).train(layer.training)
        for name in ("weight_shape", "in_features", "out_features", "in_channels", "out_channels", "kernel_size"):
            if hasattr(layer, name):  # models ask their layers for these
                setattr(folded, name, getattr(layer, name))
        for part in (down, up):
            part.weight.requires_grad_(layer.U.requires_grad)
        return folded

    @property
    def bias(self) -> Tensor | None:
        """The bias, that of `up`."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """A tensor without values, as `LowRankLayer.weight`; of quantized layers, what they themselves return."""
        weight = self.up.weight
        return stand_in(weight, self.weight_shape) if isinstance(weight, Tensor) else weight
