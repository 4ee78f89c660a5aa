"""A layer folded for inference: two matrix products in place of three."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.layers.base import LowRankLayer
from hf_condlr.layers.weight_stand_in import stand_in
from hf_condlr.linalg.precision import to_float64


class FoldedLayer(nn.Sequential):
    """`down` (Vᵀ) and `up` (U S with the bias), plain torch layers that any exporter knows."""

    down: Any
    up: Any
    weight_shape: tuple[int, ...]
    dense_class: type[nn.Module] = nn.Linear

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LowRankLayer, down: Any, up: Any) -> FoldedLayer:
        """Build the folded form of `layer` from two dense layers without values, which are filled."""
        US = to_float64(layer.U) @ to_float64(layer.S)
        down.weight.copy_(layer.V.mT.reshape(down.weight.shape))
        up.weight.copy_(US.reshape(up.weight.shape))
        up.bias = layer.bias  # the same parameter, as in `to_dense`
        folded = cls(OrderedDict(down=down, up=up)).train(layer.training)
        shape = ("weight_shape", "in_features", "out_features", "in_channels", "out_channels", "kernel_size")
        for name in (*shape, "dense_class"):
            if hasattr(layer, name):  # models ask their layers for the shape
                setattr(folded, name, getattr(layer, name))
        for part in (down, up):
            part.weight.requires_grad_(layer.U.requires_grad)
        return folded

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer with the weight U S Vᵀ, multiplied out in at least float32."""
        down, up = self.down, self.up  # convolutions or linear layers
        wide = torch.promote_types(up.weight.dtype, torch.float32)
        W = up.weight.flatten(1).to(wide) @ down.weight.flatten(1).to(wide)
        place = {"device": up.weight.device, "dtype": up.weight.dtype}
        dense: Any
        if isinstance(down, nn.Conv2d):
            names = ("in_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry = {name: getattr(down, name) for name in names}
            dense = nn.Conv2d(out_channels=up.out_channels, bias=False, **geometry, **place)
        elif self.dense_class is Conv1D:
            dense, W = Conv1D(up.out_features, down.in_features).to(**place), W.mT
        else:
            dense = nn.Linear(down.in_features, up.out_features, bias=False, **place)
        dense.weight.copy_(W.reshape(dense.weight.shape)).requires_grad_(up.weight.requires_grad)
        if up.bias is not None:
            dense.bias = up.bias
        return dense.train(self.training)

    @property
    def bias(self) -> Tensor | None:
        """The bias, that of `up`."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """A tensor without values, as `LowRankLayer.weight`; of quantized layers, what they themselves return."""
        weight = self.up.weight
        return stand_in(weight, self.weight_shape) if isinstance(weight, Tensor) else weight
