"""The likelihood of a model's own predictions, whose gradients make the Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_condlr.conversion.calibration import CalibrationBatch
from hf_condlr.errors import ConversionError, require
from hf_condlr.linalg.precision import at_least_float32

ROWS = 256  # whose probabilities are computed at a time


def likelihood(model: Any, batch: CalibrationBatch) -> str:
    """The problem type of the model's config or, where that is not set, the one that transformers infers."""
    config = getattr(model, "config", None)
    if problem_type := getattr(config, "problem_type", None):
        return problem_type
    if batch.labels is not None and batch.labels.is_floating_point() and batch.labels.dim() == 2:
        return "multi_label_classification"
    is_regression = "ForSequenceClassification" in type(model).__name__ and getattr(config, "num_labels", 0) == 1
    return "regression" if is_regression else "single_label_classification"


@torch.no_grad()
def sampled_gradient(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:  # (N, classes) -> the same
    """∂(−log p(ŷ))/∂logits with ŷ drawn from the p of the logits (N, classes), each row's its own.

    Classes: p − e_ŷ; independent classes: p − ŷ; a regression, p Gaussian of variance 1: logits − ŷ. By rows, since the
    logits of a language model are its largest tensor.
    """
    gradient = torch.empty_like(logits)
    for rows, out in zip(logits.detach().split(ROWS), gradient.split(ROWS), strict=True):
        if likelihood == "regression":
            out.normal_(generator=generator)
        elif likelihood == "multi_label_classification":
            p = rows.sigmoid()
            torch.sub(p, torch.bernoulli(p, generator=generator), out=out)
        else:
            torch.softmax(rows, -1, out=out)
            drawn = _drawn(out, generator)
            out.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=out.dtype))
    return gradient


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:  # (N, classes) -> (N, 1)
    """A class of each row by the inverse of its distribution function: one random number a row, not one a class."""
    cumulated = p.cumsum(-1)
    u = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=p.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, u, right=True).clamp_max_(p.shape[-1] - 1)


def predicted_logits(output: Any, batch: CalibrationBatch, likelihood: str) -> Tensor:
    """The logits (N, classes) of what counts in a batch, in at least float32.

    Raises:
        ConversionError: No logits of two classes or more, or values that are not finite.
    """
    logits: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    classes = 2 if likelihood == "single_label_classification" else 1
    is_tensor = isinstance(logits, Tensor)
    if not is_tensor or logits.dim() not in (2, 3) or logits.shape[-1] < classes:
        raise ConversionError(
            "'fisher' needs a model with logits (batch, classes) or (batch, tokens, classes), two classes at least",
            received=f"logits of shape {tuple(logits.shape)}" if is_tensor else "an output without logits",
            remedy="Use init_weights='activation_aware', which needs the inputs of layers only.",
        )
    rule, remedy = "the logits over the calibration data must be finite", "Look for such values in the data or weights."
    require(
        torch.isfinite(torch.stack(torch.aminmax(logits))).all(),
        rule,
        received="NaN or inf",
        remedy=remedy,
        error=ConversionError,
    )
    logits = at_least_float32(logits)
    if logits.dim() == 2:
        return logits
    masks = [m for m in (batch.decoder_mask, batch.mask) if m is not None and m.shape == logits.shape[:2]]
    return logits[masks[0]] if masks else logits.flatten(0, 1)
