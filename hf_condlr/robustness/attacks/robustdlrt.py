"""ℓ2-FGSM and Jitter by the formulas of RobustDLRT (arXiv 2505.08022), only for comparison with its tables.

Both move normalised inputs z = (x − mean)/std, leave the range of pixels, and measure ε as ‖δ_z‖_∞. They take and
return pixels like every attack: ∇_z = std·∇_x and δ_x = std·δ_z, with the std of the attacked `PixelModel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import score_and_gradient
from hf_condlr.robustness.attacks.ball import linf_unit, norms
from hf_condlr.robustness.attacks.base import (
    Attack,
    at_least_float32,
    attacked,
    logits_of,
    require,
    require_pixels,
)
from hf_condlr.robustness.attacks.losses import classes, is_correct
from hf_condlr.robustness.attacks.pixels import PixelModel


class NormalizedAttack(Attack):
    """An attack with ε in normalised units, which leaves [0, 1], as published.

    The ℓ∞ ball in these units is a box with sides proportional to each channel's std: a separate threat model.
    """

    threat = "normalised-linf-unclipped"
    within_bounds = False

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖z' − z‖_∞."""
        return norms((adversarial - inputs) / std_of(model, inputs), "linf")


@dataclass(frozen=True)
class L2FGSM(NormalizedAttack):
    """z' = z + ε g/‖g‖_∞, g = ∇_z CE(model, y): RobustDLRT's "ℓ2-FGSM" (arXiv 2505.08022).

    One step along the gradient itself, as in ℓ2, whose largest entry is ε, as in ℓ∞. It reaches the border of
    neither ball, so it is far weaker than PGD at the same ε.

    Args:
        epsilon: The largest entry of the step, in normalised units: ε·std of a channel in pixels.
    """

    epsilon: float
    name = "l2-fgsm"

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs (B, C, H, W), in at least float32."""
        require_pixels(inputs)
        with attacked(model):
            x, std = at_least_float32(inputs), std_of(model, inputs)
            _, gradient = score_and_gradient(model, x, labels, "ce")
            return x + std * self.epsilon * linf_unit(std * gradient)


@dataclass(frozen=True)
class Jitter(NormalizedAttack):
    """The loss of Schwinn et al. (arXiv 2105.10304) climbed in steps of ε g/‖g‖_∞, as in RobustDLRT.

    p = softmax(scale·ẑ/‖ẑ‖_∞) + noise·N(0, 1) of the logits ẑ, L = ‖p − onehot(y)‖², divided by ‖δ‖_∞ where the
    sample is misclassified and δ ≠ 0; δ ← clip(δ + ε g/‖g‖_∞, −ε, ε) with g = ∂L/∂δ, from δ = 0 and in normalised
    units. The norms are differentiated too: a constant factor would drop out of g/‖g‖_∞. The last iterate is the
    result, as published, not the worst one.

    Args:
        epsilon: ‖δ_z‖_∞ at most, and the largest entry of each step, in normalised units.
        steps: Iterations.
        scale: Scale of the logits after division by ‖ẑ‖_∞.
        noise: Standard deviation of the noise added to the probabilities.
        seed: Seed of the noise.
    """

    epsilon: float
    steps: int = 5
    scale: float = 10.0
    noise: float = 0.1
    seed: int = 0
    name = "jitter"

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.steps >= 1 and self.scale > 0 and self.noise >= 0
        received = f"steps={self.steps}, scale={self.scale}, noise={self.noise}"
        require(valid, "steps must be ≥ 1, scale > 0 and noise ≥ 0", received, "For example 5, 10 and 0.1.")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs (B, C, H, W), in at least float32."""
        require_pixels(inputs)
        generator = torch.Generator().manual_seed(self.seed)
        with attacked(model):
            x0, std = at_least_float32(inputs), std_of(model, inputs)
            delta = torch.zeros_like(x0)
            for _ in range(self.steps):
                delta.requires_grad_(True)
                loss = self._losses(logits_of(model(x0 + std * delta)), labels, delta, generator)
                (gradient,) = torch.autograd.grad(loss.sum(), delta)
                delta = (delta.detach() + self.epsilon * linf_unit(gradient)).clamp(-self.epsilon, self.epsilon)
            return x0 + std * delta

    def _losses(self, logits: Tensor, labels: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:  # -> (B,)
        largest = logits.abs().amax(1, keepdim=True).clamp_min(1e-12)
        probabilities = (self.scale * logits / largest).softmax(1)
        noise = torch.randn(logits.shape, generator=generator).to(probabilities)
        target = F.one_hot(classes(labels), logits.shape[1])
        losses = (probabilities + self.noise * noise - target).square().sum(1)
        size = norms(delta, "linf")
        divided = ~is_correct(logits, labels) & (size > 0)
        return losses / torch.where(divided, size, 1.0)


def std_of(model: nn.Module, like: Tensor) -> Tensor:  # -> (C, 1, 1) or (1, 1, 1)
    """The std of the `PixelModel` that the attacked model is or contains; 1 without one."""
    for module in model.modules():
        if isinstance(module, PixelModel):
            return module.std.to(like.device)
    return torch.ones(1, 1, 1, device=like.device)
