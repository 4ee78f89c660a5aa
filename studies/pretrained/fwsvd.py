"""FWSVD, a baseline: each row of the transposed weight counts by its diagonal Fisher information (Hsu et al. 2022).

With W (m, n), y = W x, and the information of input j, d_j = Σ_i E[(∂L/∂W_ij)²], the rank-r Ŵ minimises
‖(W − Ŵ) diag(d)^{1/2}‖_F: the truncated SVD of W diag(d)^{1/2}, times diag(d)^{-1/2}.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.layers import Factors


def input_information(model: nn.Module, names: Sequence[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """d of each layer, (n,): the squared gradients of the labels' loss, summed over outputs, mean over the batches.

    The gradient is that of a batch's mean loss, which is the one of a sample where batches have one, as here.
    """
    model.eval().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    sums = {name: weight.new_zeros(weight.shape[1]) for name, weight in weights.items()}
    count = 0
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.square().sum(0)
        count += 1
    model.requires_grad_(True)
    return {name: total / count for name, total in sums.items()}


def weighted_factors(W: Tensor, d: Tensor, r: int) -> Factors:  # (m, n), (n,) -> (m, r), (r, r), (n, r)
    """U S Vᵀ with orthonormal U, V of the minimiser. An input without information has 1e-4 of the largest root."""
    root = d.double().sqrt()
    root = root.clamp_min(1e-4 * root.max())
    U, sigma, Vh = torch.linalg.svd(W.double() * root, full_matrices=False)
    V, R = torch.linalg.qr((Vh[:r] / root).mT)  # Ŵ = U_r Σ_r (V R)ᵀ
    A, sigma, Bh = torch.linalg.svd(sigma[:r, None] * R.mT)
    return (U[:, :r] @ A).to(W), torch.diag(sigma).to(W), (V @ Bh.mT).to(W)
