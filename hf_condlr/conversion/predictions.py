"""The likelihood of a model's own predictions, whose gradients make the Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.conversion.calibration import CalibrationBatch
from hf_condlr.errors import ConversionError, require
from hf_condlr.linalg.precision import at_least_float32


def likelihood(model: Any, batch: CalibrationBatch) -> str:
    """The problem type of the model's config or, where that is not set, the one that transformers infers."""
    config = getattr(model, "config", None)
    if problem_type := getattr(config, "problem_type", None):
        return problem_type
    if batch.labels is not None and batch.labels.is_floating_point() and batch.labels.dim() == 2:
        return "multi_label_classification"
    is_regression = "ForSequenceClassification" in type(model).__name__ and getattr(config, "num_labels", 0) == 1
    return "regression" if is_regression else "single_label_classification"


def negative_log_likelihood(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """−log p(ŷ) with ŷ drawn from the p of the logits (N, classes), summed over the N rows."""
    mean = logits.detach()
    if likelihood == "regression":
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return (mean + noise - logits).square().sum() / 2
    if likelihood == "multi_label_classification":
        drawn = torch.bernoulli(mean.sigmoid(), generator=generator)
        return nn.functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    return nn.functional.cross_entropy(
        logits, torch.multinomial(mean.softmax(-1), 1, generator=generator)[:, 0], reduction="sum"
    )


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
    require(torch.isfinite(logits).all(), rule, received="NaN or inf", remedy=remedy, error=ConversionError)
    logits = at_least_float32(logits)
    if logits.dim() == 2:
        return logits
    masks = [m for m in (batch.decoder_mask, batch.mask) if m is not None and m.shape == logits.shape[:2]]
    return logits[masks[0]] if masks else logits.flatten(0, 1)
