"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018) in the ℓ∞ and the ℓ2 ball."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import require_iterations, score_and_gradient, worst_iterates
from hf_condlr.robustness.attacks.base import (
    Attack,
    attacked,
    logits_of,
    require_bounds,
    require_choice,
    require_inputs,
    require_radius,
)
from hf_condlr.robustness.attacks.losses import LOSSES


@dataclass(frozen=True)
class FGSM(Attack):
    """x' = clip(x + ε sign ∇ₓ CE(model(x), y)), one step to the border of the ℓ∞ ball; in the ℓ2 ball x + ε g/‖g‖₂.

    Args:
        epsilon: Radius, in units of the inputs (pixels of [0, 1] with `PixelModel`).
        bounds: Least and largest admissible input value.
        clip: False leaves the bounds, as the published experiments of CondLR did on CIFAR (arXiv 2306.01485): not an
            image any more, so a threat of its own.
        norm: `linf` or `l2`.
    """

    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)
    clip: bool = True
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        require_radius(self.epsilon)
        require_bounds(self.bounds)
        require_choice("norm", self.norm, ("linf", "l2"))

    @property
    def name(self) -> str:
        """`fgsm`, `fgm-l2`, and which of them leaves the bounds."""
        return ("fgsm" if self.norm == "linf" else "fgm-l2") + ("" if self.clip else "-unclipped")

    @property
    def threat(self) -> str:
        """The norm, and whether the bounds are left."""
        return self.norm + ("" if self.clip else "-unclipped")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32; the model is left as it was found."""
        require_inputs(inputs, self.bounds)
        with attacked(model):
            x = at_least_float32(inputs)
            _, gradient = score_and_gradient(model, x, labels, "ce")
            x = x + self.epsilon * direction(gradient, self.norm)
            return x.clamp(*self.bounds) if self.clip else x

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖x' − x‖ in the attack's norm."""
        return norms(adversarial - inputs, self.norm)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent from a random point of the ball, keeping each sample's worst iterate.

    ℓ∞: x ← clip(Π(x + α sign g)), ℓ2: x ← clip(Π(x + α g/‖g‖₂)), Π the projection on the ball of radius ε around the
    input, g = ∇ₓ of the loss. A sample's result is a misclassified iterate where there was one, else that of the
    largest loss. Random points come from a generator of its own, seeded with `seed`.

    Args:
        epsilon: Radius, in units of the inputs.
        norm: `linf` or `l2`.
        steps: Gradient steps of each restart.
        step_size: α; None for 2.5 ε/steps.
        restarts: Independent runs, the worst counts.
        loss: `ce`, `margin` or `dlr`, see `losses`.
        bounds: Least and largest admissible input value.
        seed: Of the random starts.
        early_stop: Attack a sample no further once it is misclassified, which saves its passes. False goes on: what
            is to fool another model, or to train one, should be far on the wrong side.
    """

    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "margin", "dlr"] = "ce"
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    early_stop: bool = True

    def __post_init__(self) -> None:
        require_radius(self.epsilon)
        require_bounds(self.bounds)
        require_choice("norm", self.norm, ("linf", "l2"))
        require_iterations(self.steps, self.restarts, self.step_size)
        require_choice("loss", self.loss, LOSSES)

    @property
    def name(self) -> str:
        """`pgd-linf` or `pgd-l2`, with the loss where it is not cross entropy."""
        return f"pgd-{self.norm}" + ("" if self.loss == "ce" else f"-{self.loss}")

    @property
    def threat(self) -> str:
        """The norm."""
        return self.norm

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32; the model is left as it was found.

        Args:
            model: Logits of inputs.
            inputs: `(B, ...)`, within bounds.
            labels: Classes `(B,)`, or probabilities `(B, classes)` to move away from.
        """
        require_inputs(inputs, self.bounds)
        generator = torch.Generator().manual_seed(self.seed)
        step_size = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        with attacked(model):
            x0 = at_least_float32(inputs)
            return worst_iterates(
                lambda x, index: logits_of(model(x)),
                x0,
                labels,
                start=lambda: self._random_start(x0, generator),
                move=lambda x, g, index: self._project(x0[index], x + step_size * direction(g, self.norm)),
                steps=self.steps,
                restarts=self.restarts,
                loss=self.loss,
                early_stop=self.early_stop,
            )

    def _random_start(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.norm == "linf":
            noise = torch.rand(x0.shape, generator=generator) * 2 - 1
        else:
            noise = uniform_in_ball(x0.shape, generator)
        return self._project(x0, x0 + self.epsilon * noise.to(x0.device))

    def _project(self, x0: Tensor, x: Tensor) -> Tensor:
        """On the ball, then on the bounds; x0 lies within the bounds, so clipping does not leave the ball."""
        delta = x - x0
        delta = delta.clamp(-self.epsilon, self.epsilon) if self.norm == "linf" else into_ball(delta, self.epsilon)
        return (x0 + delta).clamp(*self.bounds)

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖x' − x‖ in the attack's norm."""
        return norms(adversarial - inputs, self.norm)


def at_least_float32(inputs: Tensor) -> Tensor:
    """Detached; rounding to half precision would leave the ball."""
    inputs = inputs.clone() if inputs.is_inference() else inputs.detach()  # else nothing could be differentiated
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32))


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent: sign(g), or g/‖g‖₂ for each sample."""
    return gradient.sign() if norm == "linf" else unit(gradient)


def unit(x: Tensor) -> Tensor:  # (B, ...) -> (B, ...), each sample of ℓ2 norm 1, or 0
    """x/‖x‖₂ for each sample."""
    largest = per_sample(norms(x, "linf"), x)  # first: the squares of a confident model's gradient vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / per_sample(norms(x, "l2").clamp_min(1.0), x)


def uniform_in_ball(shape: Sequence[int], generator: torch.Generator) -> Tensor:  # (B, ...)
    """For each sample a point of the unit ℓ2 ball: a uniform direction, and a radius with density ∝ radius^{d−1}."""
    direction = unit(torch.randn(tuple(shape), generator=generator))
    radius = torch.rand(shape[0], generator=generator) ** (1 / math.prod(shape[1:]))
    return direction * per_sample(radius, direction)


def into_ball(delta: Tensor, radius: Tensor | float) -> Tensor:  # (B, ...), (B,) -> (B, ...)
    """Each sample's projection on the ℓ2 ball of its radius around 0."""
    length = norms(delta, "l2")
    return delta * per_sample(torch.where(length > radius, radius / length, 1.0), delta)


def norms(x: Tensor, norm: str) -> Tensor:  # (B, ...) -> (B,)
    """‖x‖_∞ or ‖x‖₂ of each sample."""
    return x.flatten(1).abs().amax(1) if norm == "linf" else x.flatten(1).norm(dim=1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:  # (B,), (B, ...) -> (B, 1, ...)
    """Values that broadcast over the samples of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
