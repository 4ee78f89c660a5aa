"""SGD with momentum in which some weights keep orthonormal columns (or rows): the base of the two baselines.

A weight (m, n), or a kernel (c_out, c_in, k, k) as the matrix (c_out, c_in·k·k), is a point X of the Stiefel manifold
St(p, q), XᵀX = I, with p ≥ q: the weight itself where it is tall, its transpose where it is wide. All its singular
values are 1, so κ = 1 at full rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_condlr.errors import OptimizerError, require
from hf_condlr.linalg import full_precision, orthonormality_error, retract_polar


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
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.weight.requires_grad
    ]
    orthonormalize_(weights)
    constrained = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in constrained]
    groups: list[dict[str, Any]] = [{"params": list({id(w): w for w in weights}.values()), "stiefel": True}]
    return [*groups, {"params": rest, "stiefel": False}] if rest else groups


class StiefelSGD(Optimizer):
    """SGD with momentum; weights of groups with `stiefel=True` move by `stiefel_step` instead, and stay orthonormal.

    The others obey M ← β M + G, X ← X − lr M. A parameter whose gradient or new value is not finite is left out of
    the step: it and its momentum stay as they are.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"stiefel": False, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's options are checked.

        Raises:
            OptimizerError: An option is out of its range, or a weight cannot be, or is not, orthonormal.
        """
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    def check(self, group: dict[str, Any]) -> None:
        """Raise `OptimizerError` for options and weights that the step cannot be taken with."""
        check_option("lr", group["lr"], 0 <= group["lr"] < math.inf, "a finite number ≥ 0")
        check_option("momentum", group["momentum"], 0 <= group["momentum"] < 1, "in [0, 1)")
        if group["stiefel"]:
            for parameter in group["params"]:
                _check_weight(parameter)

    def stiefel_step(self, X: Tensor, G: Tensor, M: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The next weight and momentum, from those and the gradient; all (p, q) with p ≥ q."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on the gradients in place or those that `closure` makes; returns what that returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
        return loss

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


def check_option(name: str, value: Any, condition: bool, rule: str) -> None:
    """Raise `OptimizerError` where an option is out of its range."""
    remedy = "Choose it in that range."
    require(condition, f"{name} must be {rule}", received=repr(value), remedy=remedy, error=OptimizerError)


def _check_weight(parameter: Tensor) -> None:
    require(
        parameter.dim() >= 2,
        "a weight with orthonormal columns must have at least two dimensions",
        received=f"shape {tuple(parameter.shape)}",
        remedy="Put biases and scales into a group without stiefel=True.",
        error=OptimizerError,
    )
    require(
        parameter.dtype in (torch.float32, torch.float64),
        "orthonormal weights must be float32 or float64: rounding to half precision alone breaks orthonormality",
        received=str(parameter.dtype),
        remedy="Call model.float() and train under autocast.",
        error=OptimizerError,
    )
    X = tall(parameter)
    error = orthonormality_error(X).item()
    require(
        error <= 1e-4 * math.sqrt(X.shape[1]),
        "weights in a group with stiefel=True must be orthonormal from the start",
        received=f"‖XᵀX − I‖_F = {error:.3g} for shape {tuple(parameter.shape)}",
        remedy="Call orthonormalize_(weights) first, or make the groups with stiefel_groups(model).",
        error=OptimizerError,
    )
