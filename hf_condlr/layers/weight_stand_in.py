"""The `.weight` of a factored layer: shape, dtype and device of a tensor, without values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_condlr.errors import ConversionError

FACTS = {
    *("dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_meta", "is_cuda", "is_cpu", "is_sparse"),
    *("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "get_device", "is_quantized"),
}
"""Attributes and methods that may be read; everything else would compute with the weight."""


class WeightStandIn(Tensor):
    """A tensor without values: it has a dtype, a device and a shape, and raises an error when it is computed with."""

    _is_hf_initialized = True  # transformers initialises weights that a checkpoint lacks by name: not this one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "__self__", None), "__name__", "") or getattr(func, "__name__", "")
        if name in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ConversionError(
            "the weight of a factored layer exists only as U, S and V",
            received=f"{name or func} on its `.weight`, which the model around it must compute with by itself",
            remedy="Put the layer in exclude_modules, or compute with layer.matrix().",
        )


def stand_in(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape with the dtype and device of `like`, without values and without its own memory."""
    if torch.compiler.is_compiling():  # tracing does not support the subclass
        return torch.ops.hf_condlr.weight_stand_in(like.detach(), list(shape))
    return _stand_in(like.detach(), shape)


def _stand_in(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of one NaN, expanded to `shape`: it takes no memory."""
    return like.new_full((), math.nan).expand(shape).as_subclass(WeightStandIn)


# In a traced graph an operator takes the place of the stand-in. If the graph reads only properties of it, nothing
# uses the operator's result. Otherwise it raises an error: the result is a stand-in, with strides that compiled code
# does not accept.
_traced = torch.library.custom_op(
    "hf_condlr::weight_stand_in", _stand_in, mutates_args=(), schema="(Tensor like, int[] shape) -> Tensor"
)
_traced.register_fake(lambda like, shape: like.new_empty(shape))
