"""Second moments F of the gradients at layers' outputs: with those of the inputs, the K-FAC metric of the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_condlr.conversion.calibration import evaluated, in_turns, model_arguments
from hf_condlr.errors import ConversionError


def output_fisher(
    model: nn.Module, names: Iterable[str], data: Iterable[Any], *, max_bytes: int = 4 * 2**30
) -> dict[str, Tensor]:  # {name: (m, m)}
    """F = E[Σ_t g_t g_tᵀ], g_t = −∂ log p(ŷ | x)/∂y_t at the outputs y_t of each named layer, ŷ drawn from p.

    p is the model's own; t runs over the tokens (or pixels) of a sample. With C = E[x xᵀ] of the layer's inputs, K-FAC
    takes the layer's block of the Fisher matrix for C ⊗ F (Martens and Grosse 2015): an error ΔW of the weight moves
    the predictions by KL ≈ ½ ‖F^{1/2} ΔW C^{1/2}‖_F². No labels are used; but the model must have learnt its task: the
    gradients of a classifier drawn at random say nothing.

    The model runs in evaluation mode, its parameters frozen meanwhile. ŷ is drawn with a fixed seed.

    Args:
        model: The dense model; its output has `logits`, (B, classes) or (B, T, classes).
        names: Linear, Conv1D or Conv2d layers of it.
        data: Batches, as `input_covariances` takes them.
        max_bytes: Memory for the matrices; where they need more, layers take turns and the data is gone over again.

    Raises:
        ConversionError: No batch, no logits of two classes or more, or a layer that no gradient reaches or one that is
            not finite.
    """
    return in_turns(model, names, data, _width, _one_pass, max_bytes)


def _width(layer: Any) -> int:  # m
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[1]  # Conv1D is stored transposed


def _one_pass(model: nn.Module, layers: dict[str, Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    drawn = 0

    def hook(name: str) -> Any:
        def record(gradient: Tensor) -> None:  # (*, m), or (B, m, H, W)
            rows = gradient.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else gradient
            rows = rows.reshape(-1, rows.shape[-1])
            rows = rows if rows.dtype == torch.float64 else rows.float()
            sums[name] = sums[name] + rows.mT @ rows if name in sums else rows.mT @ rows

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first one: nothing before it is differentiated
                output = output.detach().requires_grad_()
            output.register_hook(record)
            return output.clone()  # activations may change it in place

        return watch

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator: torch.Generator | None = None
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluated(model), torch.enable_grad():
            for batch in tqdm(batches, desc="calibration", disable=None):
                args, kwargs, mask = model_arguments(model, batch)
                logits = _logits(model(*args, **kwargs), mask)
                generator = generator or torch.Generator(logits.device).manual_seed(0)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                (-logits.log_softmax(-1).gather(1, labels).sum()).backward()
                drawn += len(labels)
    finally:
        for handle in hooks:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    for name in layers:
        _require_finite(name, sums.get(name))
    return {name: sums[name] / drawn for name in layers}


def _logits(output: Any, mask: Tensor | None) -> Tensor:  # -> (labels, classes), at least float32
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        shape = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "an output without logits"
        raise ConversionError(
            "'fisher' needs a model with logits (batch, classes) or (batch, tokens, classes), two classes at least",
            received=shape,
            remedy="Use init_weights='activation_aware', which needs the inputs of layers only.",
        )
    if not torch.isfinite(logits).all():
        raise ConversionError(
            "the logits over the calibration data must be finite",
            received="NaN or inf",
            remedy="Look for values in the data, or weights of the model, that are not finite or far too large.",
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.dim() == 2:
        return logits
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits.flatten(0, 1)


def _require_finite(name: str, total: Tensor | None) -> None:
    received = "none" if total is None else None
    if total is not None and not torch.isfinite(total).all():
        received = "gradients that are not finite"
    if received:
        raise ConversionError(
            f"the gradient of the predictions must reach {name!r} and be finite",
            received=received,
            remedy="Pass batches that the model accepts, or put the layer in exclude_modules.",
        )
