"""Second moments F of the gradients at layers' outputs: with those of the inputs, the K-FAC metric of the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from hf_condlr.conversion.calibration import CalibrationBatch, Grams, calibration_batches, run
from hf_condlr.errors import ConversionError, require
from hf_condlr.linalg.precision import at_least_float32


def output_fisher(model: nn.Module, names: Iterable[str], data: Iterable[Any]) -> dict[str, Tensor]:
    """F = E[Σ_t g_t g_tᵀ], g_t = −∂ log p(ŷ | x)/∂y_t at the outputs y_t of each named layer, ŷ drawn from p.

    p is the model's own: classes, independent classes for a multi-label classifier, a Gaussian of variance 1 around
    the output for a regression. t runs over the tokens (or pixels) of a sample. With C = E[x xᵀ] of the layer's inputs,
    K-FAC takes the layer's block of the Fisher matrix for C ⊗ F (Martens and Grosse 2015): an error ΔW of the weight
    changes the predictions by KL ≈ ½ ‖F^{1/2} ΔW C^{1/2}‖_F². The model must have learnt its task: the gradients of a
    classifier drawn at random say nothing.

    The model runs in evaluation mode, with frozen parameters. ŷ is drawn with a fixed seed.

    Args:
        model: The dense model; its output has `logits`, (B, classes) or (B, T, classes).
        names: Linear, Conv1D or Conv2d layers of it.
        data: Batches, as `input_covariances` takes them.

    Returns:
        {name: F (m, m)}.

    Raises:
        ConversionError: No batch, no logits of two classes or more, or a layer that no gradient reaches or one that is
            not finite.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    grams, samples = Grams(layers, "the gradient of the predictions"), 0

    def hook(name: str) -> Any:
        def record(gradient: Tensor) -> None:  # (*, m), or (B, m, H, W)
            rows = gradient.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else gradient
            grams.add(name, rows.reshape(-1, rows.shape[-1]))

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first one: nothing before it is differentiated
                output = output.detach().requires_grad_()
            output.register_hook(record)
            return output.clone()  # activations may change it in place

        return watch

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    generator: torch.Generator | None = None
    try:
        with torch.enable_grad():
            for batch in calibration_batches(model, data):
                likelihood = _likelihood(model, batch)
                logits = _logits(run(model, batch), batch, likelihood)
                generator = generator or torch.Generator(logits.device).manual_seed(0)
                _negative_log_likelihood(logits, likelihood, generator).backward()
                samples += len(logits)
    finally:
        for handle in hooks:
            handle.remove()
    return grams.means(dict.fromkeys(layers, samples))


def _likelihood(model: Any, batch: CalibrationBatch) -> str:
    """The problem type of the model's config or, where that is not set, the one that transformers infers."""
    config = getattr(model, "config", None)
    if problem_type := getattr(config, "problem_type", None):
        return problem_type
    if batch.labels is not None and batch.labels.is_floating_point() and batch.labels.dim() == 2:
        return "multi_label_classification"
    is_regression = "ForSequenceClassification" in type(model).__name__ and getattr(config, "num_labels", 0) == 1
    return "regression" if is_regression else "single_label_classification"


def _negative_log_likelihood(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """−log p(ŷ) with ŷ drawn from the p of the logits (N, classes), summed over the N rows."""
    mean = logits.detach()
    if likelihood == "regression":
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return (mean + noise - logits).square().sum() / 2
    if likelihood == "multi_label_classification":
        drawn = torch.bernoulli(mean.sigmoid(), generator=generator)
        return nnf.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    return nnf.cross_entropy(logits, torch.multinomial(mean.softmax(-1), 1, generator=generator)[:, 0], reduction="sum")


def _logits(output: Any, batch: CalibrationBatch, likelihood: str) -> Tensor:  # -> (N, classes), at least float32
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
