"""The soft penalty of RobustDLRT on the spread of a core's singular values: κ is pressed down, not bounded.

Source: Schotthöfer, Yang, Schnake, *Dynamical low-rank compression of neural networks with robustness under adversarial
attacks* (arXiv 2505.08022): κ(S) ≤ exp(R(S)/(√2 σ_r²)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.layers import factored_layers


def penalty_value(S: Tensor) -> Tensor:  # (*, r, r) -> (*,)
    """R(S) = ‖SᵀS − α²I‖_F with α² = ‖S‖_F²/r: 0 exactly where all singular values are equal."""
    X, scale = _scaled(S)
    return (torch.linalg.matrix_norm(_deviation(X)) * scale.square()).to(S.dtype)


def penalty_gradient(S: Tensor) -> Tensor:  # (*, r, r) -> (*, r, r)
    """∇R(S) = 2S(SᵀS − α²I)/R; that α depends on S does not show, as SᵀS − α²I has trace 0.

    R has a kink where it vanishes; there, up to rounding, 0 is taken from its subgradients: the quotient would be a
    direction made of rounding errors.
    """
    X, scale = _scaled(S)
    E = _deviation(X)
    R = torch.linalg.matrix_norm(E)
    rounding = 4 * torch.finfo(X.dtype).eps * X.square().sum((-2, -1))
    gradient = 2 * X @ E / torch.where(rounding < R, R, torch.inf)[..., None, None]
    return (gradient * scale[..., None, None]).to(S.dtype)


def attach_penalty(optimizer: torch.optim.Optimizer, model: nn.Module, beta: float) -> None:
    """Add β Σ R(S), over the factored layers, to what `optimizer` minimises: S.grad receives its gradient at each step.

    With `tau=inf` and `attach_manifold_step` this is training with orthonormal bases and a soft penalty. Call this
    first and `attach_manifold_step` after it: hooks run in the order in which they were made, and the manifold step
    takes S.grad out of a step if it is not finite. A core without a gradient does not move. Gradient clipping does not
    see the penalty.

    Args:
        optimizer: Holds the factors of `model`.
        model: Has `LowRankLinear` or `LowRankConv2d` layers.
        beta: β ≥ 0.
    """
    layers = factored_layers(model)

    @torch.no_grad()
    def add_gradients(*_: Any) -> None:
        for layer in layers.values():
            if layer.S.grad is not None:
                layer.S.grad.add_(penalty_gradient(layer.S.detach()), alpha=beta)

    optimizer.register_step_pre_hook(add_gradients)


def _scaled(S: Tensor) -> tuple[Tensor, Tensor]:  # (*, r, r) -> (*, r, r), (*,)
    """S/max|S| in at least float32, and max|S|: no product of large entries overflows."""
    X = S if S.dtype == torch.float64 else S.float()
    scale = X.abs().amax((-2, -1))
    return X / torch.where(scale > 0, scale, 1.0)[..., None, None], scale


def _deviation(X: Tensor) -> Tensor:  # (*, r, r) -> (*, r, r)
    """XᵀX − α²I."""
    gram = X.mT @ X
    alpha_squared = X.square().sum((-2, -1)) / X.shape[-1]
    return gram - alpha_squared[..., None, None] * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
