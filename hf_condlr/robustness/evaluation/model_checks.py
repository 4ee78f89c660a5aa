"""Checks of the attacked model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks import PixelModel
from hf_condlr.robustness.attacks.base import Inputs, attacked
from hf_condlr.robustness.evaluation.checks import Check, CheckBatch
from hf_condlr.robustness.evaluation.provenance import parameters_digest
from hf_condlr.robustness.evaluation.samples import Samples


def check_model(samples: Samples, batch: CheckBatch, digest: str) -> Iterator[Check]:
    """Check the model's logits on one batch, and that it is the model whose parameters had this digest."""
    model = samples.model
    with attacked(model), torch.no_grad():
        logits, again = model(batch.inputs), model(batch.inputs)
        own = samples.own_logits(batch.positions)
    scale = logits.abs().max().clamp_min(1e-30)
    difference = ((logits - again).abs().max() / scale).item()
    yield Check(
        "logits are repeatable",
        difference <= 1e-5 and bool(logits.isfinite().all()),
        f"a relative difference of {difference:.1e} between two calls",
        "The model is random (dropout in evaluation mode?) or its logits are not finite: attack its expectation.",
    )
    yield Check(
        "outputs are logits",
        not _are_probabilities(logits),
        f"values from {logits.min().item():.3g} to {logits.max().item():.3g}",
        "Rows sum to 1: after a softmax the gradients of confident samples vanish. Return the logits before it.",
    )
    yield _spread(model, batch.inputs)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    yield Check(
        "float32 in the attack",
        logits.dtype in (torch.float32, torch.float64) and not half,
        f"logits in {str(logits.dtype).removeprefix('torch.')}" + (", parameters in half precision" if half else ""),
        "Half precision rounds the loss that is maximised, and its gradient: attack model.float().",
    )
    same = digest == parameters_digest(model)
    gap = None if own is None else ((logits - own).abs().max() / scale).item()
    yield Check(
        "the attacked model is the model",
        same and (gap is None or gap <= (0.1 if half else 1e-3)),
        ("its parameters stayed" if same else "its parameters changed")
        + ("" if gap is None else f"; logits differ by {gap:.1e} from those of its own preprocessing"),
        "Another normalisation, tokenisation or state than the one in use was attacked.",
    )


def _spread(model: nn.Module, pixels: Inputs) -> Check:
    """Check that normalised pixels have roughly the mean 0 and the standard deviation 1 that normalisation aims at."""
    passed, found = None, "no normalisation"
    if isinstance(model, PixelModel) and isinstance(pixels, Tensor) and bool((model.std < 1).any()):
        values, ends = model.normalize(pixels), (pixels == 0) | (pixels == 1)
        mean, deviation = values.mean().item(), values.std().item()
        passed = 0.25 <= deviation <= 4 and (abs(mean) <= 2 or deviation >= 0.5)
        found = f"normalised pixels of mean {mean:.2g} and standard deviation {deviation:.2g}"
        found += f"; {ends.float().mean().item():.1%} of them black or white"
    return Check(
        "pixels are spread as the processor expects",
        passed,
        found,
        "Images are almost black, white or flat for this normalisation: their type or range was read wrongly.",
    )


def _are_probabilities(logits: Tensor) -> bool:
    return bool(((logits >= 0) & (logits <= 1)).all() and (logits.sum(1) - 1).abs().max() < 1e-4)
