"""How much of a weight its factors lose."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.factorizations import spectral_energy, whiten
from hf_condlr.layers import LayerConversion, LowRankLayer


def measure(W: Tensor, layer: LowRankLayer, config: CondLRConfig, C: Tensor | None) -> LayerConversion:
    """Compare a converted layer with the dense weight that it replaces."""
    U, S, V = layer.U, layer.S, layer.V
    is_randomized = config.init_weights == "randomized_svd"
    return LayerConversion(
        r=layer.r,
        shape=(W.shape[0], W.shape[1]),
        truncation_error=truncation_error(W, U, S, V),
        optimal_truncation_error=optimal_truncation_error(W, layer.r) if is_randomized else None,
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
    """√(Σ_{i>r} σ_i²) / ‖W‖_F, the least error of a matrix of rank r (Eckart–Young)."""
    energy = spectral_energy(W)
    total = energy.sum()
    return (energy[r:].sum() / total).sqrt().item() if total > 0 else 0.0
