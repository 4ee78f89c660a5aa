"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018) in the ℓ∞ and the ℓ2 ball."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import GradientAscent, score_and_gradient
from hf_condlr.robustness.attacks.ball import BallAttack, Norm, direction, into_ball, uniform_in_ball
from hf_condlr.robustness.attacks.base import at_least_float32, attacked, logits_of, require_inputs


@dataclass(frozen=True)
class FGSM(BallAttack):
    """x' = clip(x + ε sign ∇ₓ CE(model(x), y)), one step to the border of the ℓ∞ ball; in the ℓ2 ball x + ε g/‖g‖₂.

    Args:
        epsilon: Radius, in units of the inputs (pixels of [0, 1] with `PixelModel`).
        bounds: Least and largest admissible input value.
        clip: False leaves the bounds, as the published experiments of CondLR did on CIFAR (arXiv 2306.01485). The
            result is not an image any more, so this is a threat of its own.
        norm: `linf` or `l2`.
    """

    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)
    clip: bool = True
    norm: Norm = "linf"

    @property
    def name(self) -> str:
        """`fgsm` or `fgm-l2`, with `-unclipped` where it leaves the bounds."""
        return ("fgsm" if self.norm == "linf" else "fgm-l2") + ("" if self.clip else "-unclipped")

    @property
    def threat(self) -> str:
        """The norm, with `-unclipped` where it leaves the bounds."""
        return self.norm + ("" if self.clip else "-unclipped")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32."""
        require_inputs(inputs, self.bounds)
        with attacked(model):
            x = at_least_float32(inputs)
            _, gradient = score_and_gradient(model, x, labels, "ce")
            x = x + self.epsilon * direction(gradient, self.norm)
            return x.clamp(*self.bounds) if self.clip else x


@dataclass(frozen=True)
class PGD(GradientAscent, BallAttack):
    """Projected gradient ascent from a random point of the ball, keeping each sample's worst iterate.

    ℓ∞: x ← clip(Π(x + α sign g)), ℓ2: x ← clip(Π(x + α g/‖g‖₂)), Π the projection on the ball of radius ε around the
    input, g = ∇ₓ of the loss. Steps, restarts and loss are those of `GradientAscent`.

    Args:
        epsilon: Radius, in units of the inputs.
        norm: `linf` or `l2`.
        bounds: Least and largest admissible input value.
    """

    epsilon: float
    norm: Norm = "linf"
    bounds: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)

    @property
    def name(self) -> str:
        """`pgd-linf` or `pgd-l2`, with the loss where it is not cross entropy."""
        return f"pgd-{self.norm}" + ("" if self.loss == "ce" else f"-{self.loss}")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32.

        Args:
            model: Gives logits of inputs.
            inputs: `(B, ...)`, within bounds.
            labels: Classes `(B,)`, or probabilities `(B, classes)` to move away from.
        """
        require_inputs(inputs, self.bounds)
        generator = torch.Generator().manual_seed(self.seed)
        step_size = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        with attacked(model):
            x0 = at_least_float32(inputs)
            return self.worst_iterates(
                lambda x, index: logits_of(model(x)),
                x0,
                labels,
                start=lambda: self._random_start(x0, generator),
                move=lambda x, g, index: self._project(x0[index], x + step_size * direction(g, self.norm)),
            )

    def _random_start(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.norm == "linf":
            noise = torch.rand(x0.shape, generator=generator) * 2 - 1
        else:
            noise = uniform_in_ball(x0.shape, generator)
        return self._project(x0, x0 + self.epsilon * noise.to(x0.device))

    def _project(self, x0: Tensor, x: Tensor) -> Tensor:
        """On the ball, then on the bounds: x0 lies within the bounds, so clipping does not leave the ball."""
        delta = x - x0
        delta = delta.clamp(-self.epsilon, self.epsilon) if self.norm == "linf" else into_ball(delta, self.epsilon)
        return (x0 + delta).clamp(*self.bounds)
