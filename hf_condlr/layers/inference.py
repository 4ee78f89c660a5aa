"""`InferenceLayer`: what the forms of a layer for inference share. They have two weights in place of U, S, V."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_condlr.layers.weight_stand_in import stand_in
from hf_condlr.linalg.precision import at_least_float32

Builders = tuple[Callable[[], Any], Callable[[int], Any], Callable[[int, int], Any]]
"""Build without a bias: the dense layer; `down` for r; `up` for r and a number of rows."""

InferenceForm = Literal["folded", "pivoted"]

_SHAPE = ("weight_shape", "in_features", "out_features", "in_channels", "out_channels", "kernel_size")

_PLAIN = (Tensor, nn.Parameter, DTensor)


class InferenceLayer(nn.Module):
    """`down` and `up`, plain torch layers, applied one after the other; their rank is the number of outputs of `down`.

    Attributes:
        form: Name of the form, `folded` or `pivoted`.
        weight_shape: Shape of the dense layer's weight.
        build_dense: Builds the dense layer, without a bias.
    """

    form: ClassVar[InferenceForm]
    down: Any
    up: Any
    bias: Any
    weight_shape: tuple[int, ...]
    build_dense: Callable[[], Any]

    @property
    def r(self) -> int:
        """The rank."""
        return self.down.weight.shape[0]

    @classmethod
    def of(
        cls, L: Tensor, R: Tensor, bias: nn.Parameter | None, builders: Builders, *, replaced: nn.Module, like: Tensor
    ) -> Any:
        """Build the layer with the weight L R, which takes the place of another.

        Args:
            L: (m, r).
            R: (r, n).
            bias: The parameter itself.
            builders: Those of `LowRankLayer.builders`.
            replaced: What models ask their layers for, the shape, is copied from it, and the mode.
            like: A parameter that has the dtype, device and requires_grad.
        """
        layer = cls._with_weight(L, R, bias, builders, like)
        layer.build_dense = builders[0]
        for name in _SHAPE:
            if hasattr(replaced, name):
                setattr(layer, name, getattr(replaced, name))
        return layer.train(replaced.training)

    @classmethod
    @abstractmethod
    def _with_weight(
        cls, L: Tensor, R: Tensor, bias: nn.Parameter | None, builders: Builders, like: Tensor
    ) -> Self: ...

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor]:
        """L (m, r) and R (r, n) with W = L R; of quantized layers, what their weights stand for."""

    @torch.no_grad()
    def to_dense(self) -> Any:
        """The dense layer with the weight L R, multiplied out in at least float32."""
        L, R = map(at_least_float32, self.values())
        return filled(self.build_dense, L @ R, self.bias, like=self.down.weight).train(self.training)

    @property
    def weight(self) -> Tensor:
        """A tensor without values, as `LowRankLayer.weight`; of quantized layers, what they themselves return."""
        weight = self.down.weight
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
