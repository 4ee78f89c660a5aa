"""The layer of PEFT that holds a frozen linear layer and its updates, one for each adapter."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.errors import ConversionError, require
from hf_condlr.layers import LowRankUpdate
from hf_condlr.linalg.precision import at_least_float32


class CondLRLinear(nn.Module, BaseTunerLayer):
    """y = W₀x + b + Σ s U S Vᵀx, summed over the active adapters. W₀ is any linear layer, dense or quantized.

    Args:
        base_layer: The frozen layer.
        backend: PEFT's `QuantizationBackend` of it; None for a dense layer.
    """

    adapter_layer_names = ("condlr_factors",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, backend: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.condlr_factors = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []

    def update_layer(self, adapter_name: str, *, r: int, tau: float, scale: float) -> None:
        """Add the update of a new adapter, in float32 or float64: rounding to half precision breaks orthonormality."""
        weight = self.weight
        options: dict[str, Any] = {"tau": tau, "scale": scale, "device": weight.device}
        options["dtype"] = torch.float64 if weight.dtype == torch.float64 else torch.float32
        m, n = self.shape
        self.condlr_factors[adapter_name] = LowRankUpdate(n, m, r, **options)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix W₀."""
        base: Any = self.get_base_layer()
        return (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (*, n) -> (*, m)
        """Apply the layer and its active updates; the sum is rounded once, to the dtype of the layer's output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.condlr_factors:
                update: Any = self.condlr_factors[name]
                result = result + update(self._cast_input_dtype(x, update.S.dtype))
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Multiply out ΔW = s U S Vᵀ of an adapter, in the layout of the layer's weight."""
        update: Any = self.condlr_factors[adapter]
        delta = update.matrix()  # (m, n)
        return delta.mT if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters, all active ones by default, to the weight, in at least float32.

        Raises:
            ConversionError: With `safe_merge`, a result that is not finite; the weight is unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.condlr_factors:
                self._add(name, 1, must_be_finite=safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what `merge` added; a weight in half precision keeps the rounding of both."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a product of rank r."""
        return True

    def _add(self, name: str, sign: int, must_be_finite: bool = False) -> None:
        weight = self.get_base_weight()
        total = (at_least_float32(weight) + sign * self.get_delta_weight(name).to(weight.device)).to(weight.dtype)
        require(
            not must_be_finite or torch.isfinite(total).all(),
            "a merged weight must be finite",
            received=f"NaN or inf with the adapter {name}",
            remedy="Load the adapter again; the weight is unchanged.",
            error=ConversionError,
        )
        self.set_base_weight(total)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's update to the device of the layer; unlike PEFT's method this keeps its dtype."""
        if adapter_name in self.condlr_factors and not self.condlr_factors[adapter_name].U.is_meta:
            self.condlr_factors[adapter_name].to(self.weight.device if device is None else device)

    def __repr__(self) -> str:
        return "condlr." + super().__repr__()


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, CondLRLinear]:
    """{name: layer} of the layers that have an update of this adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CondLRLinear)}
    return {name: layer for name, layer in layers.items() if adapter in layer.condlr_factors}
