"""A layer folded for inference: two matrix products in place of three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_condlr.layers.weight_stand_in import stand_in
from hf_condlr.linalg.precision import at_least_float32

_PLAIN = (Tensor, nn.Parameter, DTensor)


class FoldedLayer(nn.Sequential):
    """`down` (Vᵀ) and `up` (U S with the bias), plain torch layers that any exporter knows."""

    down: Any
    up: Any
    weight_shape: tuple[int, ...]
    build_dense: Callable[[], Any]

    @torch.no_grad()
    def to_dense(self) -> Any:
        """The dense layer with the weight U S Vᵀ, multiplied out in at least float32."""
        US, Vh = (at_least_float32(part.weight.flatten(1)) for part in (self.up, self.down))
        return filled(self.build_dense, US @ Vh, self.up.bias, like=self.up.weight).train(self.training)

    @property
    def bias(self) -> Tensor | None:
        """The bias, that of `up`."""
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """A tensor without values, as `LowRankLayer.weight`; of quantized layers, what they themselves return."""
        weight = self.up.weight
        if not isinstance(weight, Tensor):
            return weight
        if type(weight) not in _PLAIN:  # quantized ones do not make tensors like themselves
            weight = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return stand_in(weight, self.weight_shape)


def quantized_values(layer: Any) -> Tensor:
    """The weight of a plain layer, or the values that a quantized one stands for (torchao's, and torch.ao's)."""
    weight = layer.weight() if callable(layer.weight) else layer.weight.detach()
    return weight if type(weight) in _PLAIN and not weight.is_quantized else weight.dequantize()


@torch.no_grad()
def filled(build: Callable[[], Any], W: Tensor, bias: nn.Parameter | None, *, like: Tensor) -> Any:
    """Build an ordinary layer with the matrix W (out, in) as its weight, and this very bias parameter.

    It gets the device, dtype and requires_grad of `like`. No random numbers are drawn.
    """
    with torch.device("meta"):
        layer = build()
    layer = layer.to(dtype=like.dtype).to_empty(device=like.device)
    layer.weight.copy_(W.mT if isinstance(layer, Conv1D) else W.reshape(layer.weight.shape))
    layer.weight.requires_grad_(like.requires_grad)
    layer.bias = bias
    return layer
