"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018) in the ℓ∞ and the ℓ2 ball."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.errors import AttackError


@dataclass(frozen=True)
class FGSM:
    """x' = clip(x + ε sign ∇ₓ CE(model(x), y)), one step to the border of the ℓ∞ ball.

    Args:
        epsilon: Radius, in units of the inputs (pixels of [0, 1] with `PixelModel`).
        bounds: Least and largest admissible input value.
    """

    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check(self.epsilon, self.bounds)

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32; the model is left as it was found."""
        _check_inputs(inputs, self.bounds)
        with _evaluation(model):
            x = _at_least_float32(inputs)
            _, gradient = _loss_and_gradient(model, x, labels, "ce")
            return (x + self.epsilon * gradient.sign()).clamp(*self.bounds)


@dataclass(frozen=True)
class PGD:
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
        loss: `ce`, cross entropy, or `margin`, max_{j≠y} z_j − z_y, which logits of a large scale cannot saturate.
        bounds: Least and largest admissible input value.
        seed: Of the random starts.
    """

    epsilon: float
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "margin"] = "ce"
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.epsilon, self.bounds)
        if self.norm not in ("linf", "l2"):
            raise AttackError("norm must be linf or l2", received=repr(self.norm), remedy="Choose one.")
        if self.loss not in ("ce", "margin"):
            raise AttackError("loss must be ce or margin", received=repr(self.loss), remedy="Choose one.")
        if self.steps < 1 or self.restarts < 1:
            received = f"steps={self.steps}, restarts={self.restarts}"
            raise AttackError("steps and restarts must be ≥ 1", received=received, remedy="Raise them.")
        if self.step_size is not None and not self.step_size > 0:
            raise AttackError("step_size must be > 0", received=self.step_size, remedy="None chooses 2.5 ε/steps.")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial inputs of the same shape, in at least float32; the model is left as it was found."""
        _check_inputs(inputs, self.bounds)
        generator = torch.Generator().manual_seed(self.seed)
        step_size = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        with _evaluation(model):
            x0 = _at_least_float32(inputs)
            worst, worst_score = x0, _score(model, x0, labels, self.loss)  # an attack never mends an error
            for _ in range(self.restarts):
                x = self._random_start(x0, generator)
                for _ in range(self.steps):
                    score, gradient = _loss_and_gradient(model, x, labels, self.loss)
                    worst, worst_score = _keep_worse(worst, worst_score, x, score)
                    x = self._project(x0, x + step_size * _direction(gradient, self.norm))
                score = _score(model, x, labels, self.loss)
                worst, worst_score = _keep_worse(worst, worst_score, x, score)
        return worst

    def _random_start(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        if self.norm == "linf":
            noise = torch.rand(x0.shape, generator=generator).to(x0.device) * 2 - 1
        else:  # uniform in the ball: a uniform direction, and a radius with density ∝ radius^{d−1}
            noise = _unit(torch.randn(x0.shape, generator=generator).to(x0.device))
            radius = torch.rand(len(x0), generator=generator).to(x0.device) ** (1 / x0[0].numel())
            noise = noise * radius.reshape(-1, *[1] * (x0.dim() - 1))
        return self._project(x0, x0 + self.epsilon * noise)

    def _project(self, x0: Tensor, x: Tensor) -> Tensor:
        """On the ball, then on the bounds; x0 lies within the bounds, so clipping does not leave the ball."""
        delta = x - x0
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            norm = delta.flatten(1).norm(dim=1).reshape(-1, *[1] * (x0.dim() - 1))
            delta = delta * (self.epsilon / norm.clamp_min(self.epsilon)) if self.epsilon > 0 else delta * 0
        return (x0 + delta).clamp(*self.bounds)


# ------------------------------------------------------------------------------------------------------- pieces


def _check(epsilon: float, bounds: tuple[float, float]) -> None:
    if not 0 <= epsilon < float("inf"):
        raise AttackError("epsilon must be finite and ≥ 0", received=epsilon, remedy="For pixels, 8/255, say.")
    if not bounds[0] < bounds[1]:
        raise AttackError("bounds must be (least, largest)", received=bounds, remedy="(0, 1) for pixels.")


def _check_inputs(inputs: Tensor, bounds: tuple[float, float]) -> None:
    if not inputs.is_floating_point():
        raise AttackError("inputs must be floating point", received=inputs.dtype, remedy="Divide 8-bit pixels by 255.")
    if not len(inputs):
        raise AttackError("inputs must hold at least one sample", received="none", remedy="Skip empty batches.")
    low, high = inputs.min().item(), inputs.max().item()
    if not (bounds[0] <= low and high <= bounds[1]):
        raise AttackError(
            f"inputs must lie within bounds={bounds}",
            received=f"values from {low:.3g} to {high:.3g}",
            remedy="Attack pixels, with the normalisation inside the model: PixelModel(model, mean, std).",
        )


def _at_least_float32(inputs: Tensor) -> Tensor:
    """Detached; rounding to half precision would leave the ball."""
    return inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), gradients on, autocast off; every module's training flag as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def _loss_and_gradient(model: nn.Module, x: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Score of each sample, detached, and the gradient of the summed loss at x; parameters get no gradient."""
    x = x.detach().requires_grad_(True)
    logits = model(x)
    (gradient,) = torch.autograd.grad(_losses(logits, labels, loss).sum(), x)
    return _score_of_logits(logits.detach(), labels, loss), gradient


@torch.no_grad()
def _score(model: nn.Module, x: Tensor, labels: Tensor, loss: str) -> Tensor:
    return _score_of_logits(model(x), labels, loss)


def _score_of_logits(logits: Tensor, labels: Tensor, loss: str) -> Tensor:  # (B, classes), (B,) -> (B,)
    """The loss, or inf where the label is not the argmax: a misclassified iterate is the worst."""
    return torch.where(logits.argmax(-1) != labels, torch.inf, _losses(logits, labels, loss))


def _losses(logits: Tensor, labels: Tensor, loss: str) -> Tensor:  # (B, classes), (B,) -> (B,)
    if loss == "ce":
        return F.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - own


def _keep_worse(worst: Tensor, worst_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    worse = score >= worst_score  # a saturated loss is 0 at every iterate: the last one went furthest
    mask = worse.reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(mask, x.detach(), worst), torch.where(worse, score, worst_score)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else _unit(gradient)


def _unit(x: Tensor) -> Tensor:  # (B, ...) -> (B, ...), each sample of ℓ2 norm 1, or 0
    shape = (-1, *[1] * (x.dim() - 1))
    largest = x.flatten(1).abs().amax(1).reshape(shape)  # first: the squares of a confident model's gradient vanish
    x = x / torch.where(largest > 0, largest, 1.0)
    return x / x.flatten(1).norm(dim=1).clamp_min(1.0).reshape(shape)
