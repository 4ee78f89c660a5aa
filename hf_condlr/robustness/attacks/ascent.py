"""Gradient ascent that keeps each sample's worst iterate: what PGD is on pixels and on the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_condlr.robustness.attacks.base import logits_of, require
from hf_condlr.robustness.attacks.losses import losses, scores


def worst_iterates(
    logits: Callable[..., Tensor],
    x0: Tensor,
    labels: Tensor,
    *,
    start: Callable[[], Tensor],
    move: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    restarts: int,
    loss: str,
    early_stop: bool,
) -> Tensor:  # (B, ...)
    """Gradient ascent from several starts, whatever the ball: each sample's worst iterate.

    Args:
        logits: (x, index) ↦ (k, classes), at the points x (k, ...) of the samples `index` (k,).
        x0: The point without an attack, of every sample (B, ...).
        labels: Classes (B,), or probabilities (B, classes).
        start: Draws a point for every sample, once for each restart.
        move: (x, g, index) ↦ the next points, g the gradient of the loss at x.
        steps: Of each restart.
        restarts: Starts.
        loss: See `losses`.
        early_stop: Leave a sample alone once it is misclassified.
    """
    with torch.no_grad():  # an attack never mends an error
        everyone = torch.arange(len(x0), device=x0.device)
        worst, worst_score = x0.clone(), scores(logits(x0, everyone), labels, loss)
    for _ in range(restarts):
        x, index = start(), everyone  # for all samples: none depends on which were stopped
        for step in range(steps + 1):
            if early_stop and not (going := worst_score[index] < torch.inf).all():
                index, x = index[going], x[going]
                if not len(index):
                    return worst
            at_x = partial(logits, index=index)
            if step < steps:
                score, gradient = score_and_gradient(at_x, x, labels[index], loss)
            else:
                with torch.no_grad():
                    score = scores(at_x(x), labels[index], loss)
            worse = score >= worst_score[index]  # a saturated loss is 0 at every iterate: the last one went furthest
            worst[index[worse]], worst_score[index[worse]] = x[worse], score[worse]
            if step < steps:
                x = move(x, gradient, index)
    return worst


def score_and_gradient(
    model: Callable[[Tensor], Any], x: Tensor, labels: Tensor, loss: str
) -> tuple[Tensor, Tensor]:  # -> (B,), (B, ...)
    """Score of each sample, detached, and the gradient of the summed loss at x; parameters get no gradient.

    What is not finite in the gradient counts as zero: a step along it would end in no input at all, which a model
    misclassifies as it would nothing else.
    """
    x = x.detach().requires_grad_(True)
    logits = logits_of(model(x))
    if not logits.requires_grad:  # no path back to the inputs, through an argmax, say: the gradient is zero
        return scores(logits, labels, loss), torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(losses(logits, labels, loss).sum(), x, materialize_grads=True)
    return scores(logits.detach(), labels, loss), gradient.nan_to_num(0.0, 0.0, 0.0)


def require_iterations(steps: int, restarts: int, step_size: float | None = None) -> None:
    """At least one step and one run, a step that goes forward."""
    received = f"steps={steps}, restarts={restarts}"
    require(steps >= 1 and restarts >= 1, "steps and restarts must be ≥ 1", received, "Raise them.")
    require(step_size is None or step_size > 0, "step_size must be > 0", step_size, "None chooses 2.5 ε/steps.")
