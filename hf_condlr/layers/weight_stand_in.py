"""What a factored layer answers where a model's code reads facts of its `.weight`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_condlr.errors import ConversionError


class WeightStandIn(Tensor):
    """A tensor without values: it has a dtype, a device and a shape, and refuses to be computed with."""

    _is_hf_initialized = True  # transformers draws weights that a checkpoint lacks by name: it has to pass over this

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


FACTS = {"dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_meta", "is_cuda", "is_cpu", "is_sparse"}


def stand_in(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One NaN, expanded: no memory. A plain tensor while a graph is traced, where subclasses get in the way."""
    plain = like.detach().new_full((), math.nan).expand(shape)
    return plain if torch.compiler.is_compiling() else plain.as_subclass(WeightStandIn)
