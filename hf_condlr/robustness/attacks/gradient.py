"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018) in the ℓ∞ and the ℓ2 ball."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import GradientAscent, score_and_gradient
from hf_condlr.robustness.attacks.ball import BallAttack, Norm, direction, into_ball, uniform_in_ball
from hf_condlr.robustness.attacks.base import at_least_float32, attacked, logits_of, require_pixels


@dataclass(frozen=True)
class FGSM(BallAttack):
    """x' = clip(x + ε sign ∇ₓ CE(model(x), y)), one step to the border of the ℓ∞ ball; in the ℓ2 ball x + ε g/‖g‖₂.

    Args:
        epsilon: Radius, in pixels of [0, 1].
        clip: False leaves [0, 1], as the published experiments of CondLR did on CIFAR (arXiv 2306.01485). The
            result is not an image any more, so this is a separate threat model.
        norm: `linf` or `l2`.
    """

    epsilon: float
    clip: bool = True
    norm: Norm = "linf"

    @property
    def name(self) -> str:
        return ("fgsm" if self.norm == "linf" else "fgm-l2") + ("" if self.clip else "-unclipped")

    @property
    def threat(self) -> str:
        return self.norm + ("" if self.clip else "-unclipped")

    @property
    def within_bounds(self) -> bool:  # type: ignore[override]
        return self.clip

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial pixels (B, ...), in at least float32."""
        require_pixels(inputs)
        with attacked(model):
            x = at_least_float32(inputs)
            _, gradient = score_and_gradient(model, x, labels, "ce")
            x = x + self.epsilon * direction(gradient, self.norm)
            return x.clamp(0, 1) if self.clip else x


@dataclass(frozen=True)
class PGD(GradientAscent, BallAttack):
    """Projected gradient ascent from a random point of the ball, keeping each sample's worst iterate.

    ℓ∞: x ← clip(Π(x + α sign g)), ℓ2: x ← clip(Π(x + α g/‖g‖₂)), Π the projection on the ball of radius ε around the
    input, g = ∇ₓ of the loss. Steps, restarts and loss are those of `GradientAscent`.

    Args:
        epsilon: Radius, in pixels of [0, 1].
        norm: `linf` or `l2`.
    """

    epsilon: float
    norm: Norm = "linf"

    @property
    def name(self) -> str:
        return f"pgd-{self.norm}" + ("" if self.loss == "ce" else f"-{self.loss}")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial pixels (B, ...), in at least float32; labels may be probabilities (B, classes), too."""
        require_pixels(inputs)
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
        """Project on the ball, then on [0, 1]: x0 lies in [0, 1], so clipping does not leave the ball."""
        delta = x - x0
        delta = delta.clamp(-self.epsilon, self.epsilon) if self.norm == "linf" else into_ball(delta, self.epsilon)
        return (x0 + delta).clamp(0, 1)
