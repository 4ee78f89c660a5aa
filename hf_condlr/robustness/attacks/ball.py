"""The ℓ∞ and ℓ2 balls around an input: `BallAttack`, norms, projections and random points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import Attack, require, require_choice

Norm = Literal["linf", "l2"]


class BallAttack(Attack):
    """An attack on pixels that stays in the ball ‖x' − x‖ ≤ ε of a norm, and in [0, 1]."""

    norm: Norm

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("norm", self.norm, ("linf", "l2"))
        epsilon = f"{self.epsilon:g}"
        remedy = f"For {epsilon} levels of an 8-bit image give {epsilon}/255."
        require(self.norm == "l2" or self.epsilon <= 1, "epsilon of an ℓ∞ attack must be at most 1", epsilon, remedy)

    @property
    def threat(self) -> str:
        return self.norm

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖x' − x‖ in the attack's norm."""
        return norms(adversarial - inputs, self.norm)


def norms(x: Tensor, norm: str) -> Tensor:  # (B, ...) -> (B,)
    """‖x‖_∞ or ‖x‖₂ of each sample."""
    return x.flatten(1).abs().amax(1) if norm == "linf" else x.flatten(1).norm(dim=1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:  # (B,), (B, ...) -> (B, 1, ...)
    """Values that broadcast over the samples of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def linf_unit(x: Tensor) -> Tensor:  # (B, ...) -> (B, ...), each sample of ℓ∞ norm 1, or 0
    """x/‖x‖_∞ for each sample."""
    largest = per_sample(norms(x, "linf"), x)
    return x / torch.where(largest > 0, largest, 1.0)


def unit(x: Tensor) -> Tensor:  # (B, ...) -> (B, ...), each sample of ℓ2 norm 1, or 0
    """x/‖x‖₂ for each sample."""
    x = linf_unit(x)  # first, since the squares of a confident model's gradient underflow
    return x / per_sample(norms(x, "l2").clamp_min(1.0), x)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent: sign(g), or g/‖g‖₂ for each sample."""
    return gradient.sign() if norm == "linf" else unit(gradient)


def uniform_in_ball(shape: Sequence[int], generator: torch.Generator) -> Tensor:  # (B, ...)
    """For each sample a point of the unit ℓ2 ball: a uniform direction, and a radius with density ∝ radius^{d−1}."""
    direction = unit(torch.randn(tuple(shape), generator=generator))
    radius = torch.rand(shape[0], generator=generator) ** (1 / math.prod(shape[1:]))
    return direction * per_sample(radius, direction)


def into_ball(delta: Tensor, radius: Tensor | float) -> Tensor:  # (B, ...), (B,) -> (B, ...)
    """Each sample's projection on the ℓ2 ball of its radius around 0."""
    length = norms(delta, "l2")
    return delta * per_sample(torch.where(length > radius, radius / length, 1.0), delta)
