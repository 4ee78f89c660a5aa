"""Gradient ascent that keeps each sample's worst iterate: PGD, on pixels and on the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hf_condlr.robustness.attacks.base import Attack, logits_of, require, require_choice
from hf_condlr.robustness.attacks.losses import LOSSES, losses, scores


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Attack):
    """The parameters of an attack of several gradient steps, and its loop.

    A sample's result is a misclassified iterate if there was one, else the iterate of the largest loss.

    Args:
        steps: Gradient steps of each restart.
        step_size: α, in the units of `epsilon`; None for 2.5 ε/steps.
        restarts: Independent runs; the worst counts.
        loss: `ce`, `margin` or `dlr`, see `losses`.
        seed: Seed of the random starts.
        early_stop: Stop with a sample once it is misclassified, which saves passes. With False the attack
            continues: an example for another model, or for training, should be far on the wrong side.
    """

    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "margin", "dlr"] = "ce"
    seed: int = 0
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        received = f"steps={self.steps}, restarts={self.restarts}"
        require(min(self.steps, self.restarts) >= 1, "steps and restarts must be ≥ 1", received, "Raise them.")
        positive = self.step_size is None or self.step_size > 0
        require(positive, "step_size must be > 0", self.step_size, "None chooses 2.5 ε/steps.")
        require_choice("loss", self.loss, LOSSES)

    def worst_iterates(
        self,
        logits: Callable[..., Tensor],
        x0: Tensor,
        labels: Tensor,
        *,
        start: Callable[[], Tensor],
        move: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # (B, ...)
        """Each sample's worst iterate of gradient ascent from several starts.

        Args:
            logits: (x, index) ↦ (k, classes), at the points x (k, ...) of the samples `index` (k,).
            x0: The original point of every sample (B, ...).
            labels: Classes (B,), or probabilities (B, classes).
            start: Draws a point for every sample, once for each restart.
            move: (x, g, index) ↦ the next points, g the gradient of the loss at x.
        """
        with torch.no_grad():  # an attack never corrects an error
            everyone = torch.arange(len(x0), device=x0.device)
            worst, worst_score = x0.clone(), scores(logits(x0, everyone), labels, self.loss)
        for _ in range(self.restarts):
            x, index = start(), everyone  # drawn for all samples, so that none depends on which were stopped
            for step in range(self.steps + 1):
                if self.early_stop and not (going := worst_score[index] < torch.inf).all():
                    index, x = index[going], x[going]
                    if not len(index):
                        return worst
                at_x = partial(logits, index=index)
                if step < self.steps:
                    score, gradient = score_and_gradient(at_x, x, labels[index], self.loss)
                else:
                    with torch.no_grad():
                        score = scores(at_x(x), labels[index], self.loss)
                worse = score >= worst_score[index]  # ≥: a saturated loss is 0 everywhere, and the last went furthest
                worst[index[worse]], worst_score[index[worse]] = x[worse], score[worse]
                if step < self.steps:
                    x = move(x, gradient, index)
        return worst


def score_and_gradient(
    model: Callable[[Tensor], Any], x: Tensor, labels: Tensor, loss: str
) -> tuple[Tensor, Tensor]:  # -> (B,), (B, ...)
    """Score of each sample, detached, and the gradient of the summed loss at x; parameters get no gradient.

    Entries of the gradient that are not finite become zero: a step along them would leave the set of inputs.
    """
    x = x.detach().requires_grad_(True)
    logits = logits_of(model(x))
    if not logits.requires_grad:  # for example an argmax cuts the path to the inputs: the gradient is zero
        return scores(logits, labels, loss), torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(losses(logits, labels, loss).sum(), x, materialize_grads=True)
    return scores(logits.detach(), labels, loss), gradient.nan_to_num(0.0, 0.0, 0.0)
