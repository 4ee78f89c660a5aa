"""What a conversion did to each layer, and how much of the weight it lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.factorizations import spectral_energy, whiten
from hf_condlr.conversion.rank_budget import (
    factored_size,
)
from hf_condlr.layers import (
    LowRankLayer,
)


@dataclass
class LayerConversion:
    """What became of one layer."""

    r: int
    shape: tuple[int, int]
    truncation_error: float
    """‖W − U S Vᵀ‖_F / ‖W‖_F."""
    optimal_truncation_error: float | None = None
    """The least error at this rank, measured where the start is not the optimum itself (`randomized_svd`)."""
    whitened_truncation_error: float | None = None
    """‖(W − U S Vᵀ) C^{1/2}‖_F / ‖W C^{1/2}‖_F, C = E[x xᵀ] over the calibration data (a start that knows it)."""

    @property
    def parameters(self) -> int:
        """r(m + n) + r², the bias aside."""
        return factored_size(*self.shape, self.r)


@dataclass
class ConversionReport:
    """Layers converted, and layers that match the targets but stay dense, with the reason."""

    converted: dict[str, LayerConversion] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        dense = sum(m * n for m, n in (layer.shape for layer in self.converted.values()))
        factored = sum(layer.parameters for layer in self.converted.values())
        lines = [f"{len(self.converted)} layers converted, {dense:,} weights became {factored:,}"]
        lines += [f"  left dense: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _measured(W: Tensor, layer: LowRankLayer, config: CondLRConfig, C: Tensor | None) -> LayerConversion:
    U, S, V = layer.U, layer.S, layer.V
    return LayerConversion(
        r=layer.r,
        shape=(W.shape[0], W.shape[1]),
        truncation_error=truncation_error(W, U, S, V),
        optimal_truncation_error=optimal_truncation_error(W, layer.r)
        if config.init_weights == "randomized_svd"
        else None,
        whitened_truncation_error=None if C is None else whitened_truncation_error(W, C, U, S, V),
    )


def truncation_error(W: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    """‖W − U S Vᵀ‖_F / ‖W‖_F."""
    wide = W if W.dtype == torch.float64 else W.float()
    norm = wide.norm()
    difference = wide - U.to(wide.dtype) @ S.to(wide.dtype) @ V.to(wide.dtype).mT
    return (difference.norm() / norm).item() if norm > 0 else 0.0


def whitened_truncation_error(W: Tensor, C: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    """‖(W − U S Vᵀ) C^{1/2}‖_F / ‖W C^{1/2}‖_F."""
    norm = whiten(W, C).norm()
    difference = W.double() - U.double() @ S.double() @ V.double().mT
    return (whiten(difference, C).norm() / norm).item() if norm > 0 else 0.0


def optimal_truncation_error(W: Tensor, r: int) -> float:
    """√(Σ_{i>r} σ_i²) / ‖W‖_F, what no rank-r matrix undercuts (Eckart–Young)."""
    energy = spectral_energy(W)
    total = energy.sum()
    return (energy[r:].sum() / total).sqrt().item() if total > 0 else 0.0
