"""A layer folded for inference: two matrix products in place of three."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.weight_stand_in import stand_in


class FoldedLayer(nn.Sequential):
    """`down` (Vᵀ) and `up` (U S with the bias), plain torch layers that any exporter knows."""

    up: Any
    weight_shape: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LowRankLayer, down: Any, up: Any) -> FoldedLayer:
        """Fill the two layers from the factors of `layer`."""
        US = layer.U.double() @ layer.S.double() if layer.U.device.type != "mps" else layer.U @ layer.S
        down.weight.copy_(layer.V.mT.reshape(down.weight.shape))
        up.weight.copy_(US.reshape(up.weight.shape))
        up.bias = layer.bias  # itself, as `to_dense` does
        folded = cls(OrderedDict(down=down, up=up)).train(layer.training)
        for name in ("weight_shape", "in_features", "out_features", "in_channels", "out_channels", "kernel_size"):
            if hasattr(layer, name):  # models ask their layers for these
                setattr(folded, name, getattr(layer, name))
        for part in (down, up):
            part.weight.requires_grad_(layer.U.requires_grad)
        return folded

    @property
    def bias(self) -> Tensor | None:
        """The layer's b."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """As `LowRankLayer.weight`."""
        return stand_in(self.up.weight, self.weight_shape)
