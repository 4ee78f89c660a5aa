"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018) in the ℓ∞ and the ℓ2 ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_condlr.attacks.base import (
    Attack,
    attacked,
    logits_of,
    require,
    require_bounds,
    require_choice,
    require_inputs,
    require_radius,
)
from hf_condlr.attacks.losses import LOSSES, losses, scores


@dataclass(frozen=True)
class FGSM(Attack):
    """x' = clip(x + ε sign ∇ₓ CE(model(x), y)), one step to the border of the ℓ∞ ball.

    Args:
        epsilon: Radius, in units of the inputs (pixels of [0, 1] with `PixelModel`).
        bounds: Least and largest admissible input value.
        clip: False leaves the bounds, as the published experiments of CondLR did on CIFAR (arXiv 2306.01485): not an
            image any more, so a threat of its own.
    """

    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)
    clip: bool = True

    def __post_init__(self) -> None:
        require_radius(self.epsilon)
        require_bounds(self.bounds)

    @property
    def name(self) -> str:
        """`fgsm` or `fgsm-unclipped`."""
        return "fgsm" if self.clip else "fgsm-unclipped"

    @property
    def threat(self) -> str:
        """ℓ∞, with or without bounds."""
        return "linf" if self.clip else "linf-unclipped"

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32; the model is left as it was found."""
        require_inputs(inputs, self.bounds)
        with attacked(model):
            x = at_least_float32(inputs)
            _, gradient = score_and_gradient(model, x, labels, "ce")
            x = x + self.epsilon * gradient.sign()
            return x.clamp(*self.bounds) if self.clip else x

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖x' − x‖_∞."""
        return norms(adversarial - inputs, "linf")


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
        with attacked(model):
            x0 = at_least_float32(inputs)
            with torch.no_grad():  # an attack never mends an error
                worst, score = x0.clone(), scores(logits_of(model(x0)), labels, self.loss)
            for _ in range(self.restarts):
                start = self._random_start(x0, generator)  # for all samples: none depends on which were stopped
                self._ascend(model, x0, start, labels, worst, score)
        return worst

    def _ascend(
        self, model: nn.Module, x0: Tensor, x: Tensor, labels: Tensor, worst: Tensor, worst_score: Tensor
    ) -> None:
        """One run from `x`; writes each sample's worst iterate and its score into the last two arguments."""
        step_size = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        index = torch.arange(len(x0), device=x0.device)
        for step in range(self.steps + 1):
            if self.early_stop and not (going := worst_score[index] < torch.inf).all():
                index, x = index[going], x[going]
                if not len(index):
                    return
            if step < self.steps:
                score, gradient = score_and_gradient(model, x, labels[index], self.loss)
            else:
                with torch.no_grad():
                    score = scores(logits_of(model(x)), labels[index], self.loss)
            worse = score >= worst_score[index]  # a saturated loss is 0 at every iterate: the last one went furthest
            worst[index[worse]], worst_score[index[worse]] = x[worse], score[worse]
            if step < self.steps:
                x = self._project(x0[index], x + step_size * direction(gradient, self.norm))

    def _random_start(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.norm == "linf":
            noise = torch.rand(x0.shape, generator=generator).to(x0.device) * 2 - 1
        else:  # uniform in the ball: a uniform direction, and a radius with density ∝ radius^{d−1}
            noise = unit(torch.randn(x0.shape, generator=generator).to(x0.device))
            noise = noise * per_sample(torch.rand(len(x0), generator=generator).to(x0.device), x0) ** (
                1 / x0[0].numel()
            )
        return self._project(x0, x0 + self.epsilon * noise)

    def _project(self, x0: Tensor, x: Tensor) -> Tensor:
        """On the ball, then on the bounds; x0 lies within the bounds, so clipping does not leave the ball."""
        delta = x - x0
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            length = per_sample(norms(delta, "l2"), delta)
            delta = delta * (self.epsilon / length.clamp_min(self.epsilon)) if self.epsilon > 0 else delta * 0
        return (x0 + delta).clamp(*self.bounds)

    def distance(self, model: nn.Module, inputs: Tensor, adversarial: Tensor) -> Tensor:  # -> (B,)
        """‖x' − x‖ in the attack's norm."""
        return norms(adversarial - inputs, self.norm)


# ------------------------------------------------------------------------------------------------------- pieces


def require_iterations(steps: int, restarts: int, step_size: float | None = None) -> None:
    """At least one step and one run, a step that goes forward."""
    received = f"steps={steps}, restarts={restarts}"
    require(steps >= 1 and restarts >= 1, "steps and restarts must be ≥ 1", received, "Raise them.")
    require(step_size is None or step_size > 0, "step_size must be > 0", step_size, "None chooses 2.5 ε/steps.")


def at_least_float32(inputs: Tensor) -> Tensor:
    """Detached; rounding to half precision would leave the ball."""
    return inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))


def score_and_gradient(model: nn.Module, x: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Score of each sample, detached, and the gradient of the summed loss at x; parameters get no gradient."""
    x = x.detach().requires_grad_(True)
    logits = logits_of(model(x))
    (gradient,) = torch.autograd.grad(losses(logits, labels, loss).sum(), x)
    return scores(logits.detach(), labels, loss), gradient


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent: sign(g), or g/‖g‖₂ for each sample."""
    return gradient.sign() if norm == "linf" else unit(gradient)


def unit(x: Tensor) -> Tensor:  # (B, ...) -> (B, ...), each sample of ℓ2 norm 1, or 0
    """x/‖x‖₂ for each sample."""
    largest = per_sample(norms(x, "linf"), x)  # first: the squares of a confident model's gradient vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / per_sample(norms(x, "l2").clamp_min(1.0), x)


def norms(x: Tensor, norm: str) -> Tensor:  # (B, ...) -> (B,)
    """‖x‖_∞ or ‖x‖₂ of each sample."""
    return x.flatten(1).abs().amax(1) if norm == "linf" else x.flatten(1).norm(dim=1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:  # (B,), (B, ...) -> (B, 1, ...)
    """Values that broadcast over the samples of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
