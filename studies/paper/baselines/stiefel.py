"""SGD with momentum in which some weights keep orthonormal columns (or rows): the base of the two baselines.

A weight (m, n), or a kernel (c_out, c_in, k, k) as the matrix (c_out, c_in·k·k), is a point X of the Stiefel manifold
St(p, q), XᵀX = I, with p ≥ q: the weight itself where it is tall, its transpose where it is wide. All its singular
values are 1, so κ = 1 at full rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_condlr.linalg import full_precision, retract_polar


def orthonormalize_(parameters: Iterable[Tensor]) -> None:
    """Replace each weight, in place, by the nearest one with orthonormal columns (rows, where it is wide)."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(untall(retract_polar(tall(parameter)), parameter))


def stiefel_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: the weights of all linear and convolutional layers, made orthonormal here; and the rest.

    Example:
        >>> optimizer = CayleySGD(stiefel_groups(model), lr=0.1, momentum=0.9)
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    orthonormalize_(weights)
    constrained = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in constrained]
    return [{"params": weights, "stiefel": True}, {"params": rest, "stiefel": False}]


class StiefelSGD(Optimizer):
    """SGD with momentum; weights of groups with `stiefel=True` move by `stiefel_step` instead, and stay orthonormal.

    Those weights must be orthonormal from the start, see `stiefel_groups`. The others obey M ← β M + G, X ← X − lr M. A
    parameter whose gradient or new value is not finite is left out of the step: it and its momentum stay as they are.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"stiefel": False, **defaults})

    def stiefel_step(self, X: Tensor, G: Tensor, M: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The next weight and momentum, from those and the gradient; all (p, q) with p ≥ q."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step on the gradients that backward left."""
        with full_precision():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[parameter].get("momentum_buffer")
        momentum = torch.zeros_like(parameter) if momentum is None else momentum
        if group["stiefel"]:
            X, M = self.stiefel_step(tall(parameter), tall(gradient), tall(momentum), group)
            X, M = untall(X, parameter), untall(M, parameter)
        else:
            M = group["momentum"] * momentum + gradient
            X = parameter - group["lr"] * M
        # A gradient that is not finite shows in both: one check for gradient, momentum and value.
        if bool(torch.isfinite(X).all() & torch.isfinite(M).all()):
            parameter.copy_(X)
            self.state[parameter]["momentum_buffer"] = M


def tall(weight: Tensor) -> Tensor:  # (m, n) or (c_out, c_in, k, k) -> (p, q), p ≥ q
    """The point of the Stiefel manifold that a weight stands for."""
    matrix = weight.detach().flatten(1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def untall(X: Tensor, weight: Tensor) -> Tensor:  # (p, q) -> as weight
    """The inverse of `tall`."""
    rows, columns = weight.shape[0], weight[0].numel()
    return (X if rows >= columns else X.mT).reshape(weight.shape)
