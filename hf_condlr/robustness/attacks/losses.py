"""The losses that gradient attacks maximise, and the score that decides which iterate is the worst."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("ce", "margin", "dlr")


def losses(logits: Tensor, labels: Tensor, loss: str) -> Tensor:  # (B, classes), (B,) -> (B,)
    """The loss of each sample.

    - `ce`: cross entropy −log softmax(z)_y. With probabilities (B, classes) as labels, their cross entropy: the
      Kullback-Leibler divergence up to a constant.
    - `margin`: max_{j≠y} z_j − z_y, which does not saturate for large logits.
    - `dlr`: the same over z_(1) − z_(3), the largest less the third largest logit, so that scale and shift of the
      logits do not matter (Croce and Hein 2020); with two classes it is the margin.
    """
    if labels.is_floating_point() and loss == "ce":
        return F.cross_entropy(logits, labels, reduction="none")
    labels = classes(labels)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    if loss == "ce":
        # log(1 + Σ_{j≠y} e^{z_j − z_y}): the gradient p_y − 1 of z_y, which is 0 where p_y rounds to 1, is here the sum
        # of the other p_j, which points the right way up to a gap of about 100 in float32.
        return (logits - own[:, None]).scatter(1, labels[:, None], 0.0).logsumexp(1)
    margin = logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own
    if loss == "margin" or logits.shape[1] < 3:
        return margin
    largest = logits.topk(3, dim=1).values
    return margin / (largest[:, 0] - largest[:, 2]).clamp_min(1e-12)


def scores(logits: Tensor, labels: Tensor, loss: str) -> Tensor:  # (B, classes), (B,) -> (B,)
    """The loss, or inf (the worst) where a sample is misclassified or its logits are not finite."""
    values = losses(logits, labels, loss)
    return torch.where(is_correct(logits, labels) & ~values.isnan(), values, torch.inf)


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:  # (B, classes), (B,) -> (B,) bool
    """Whether the label has the largest logit; logits that are not finite count as wrong."""
    return (logits.argmax(1) == classes(labels)) & logits.isfinite().all(1)


def classes(labels: Tensor) -> Tensor:  # (B,) or (B, classes) -> (B,)
    """Class numbers, of labels given as such or as probabilities."""
    return labels.argmax(1) if labels.is_floating_point() else labels
