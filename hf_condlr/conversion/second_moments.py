"""Second moments over calibration data that a config's start and ranks need: C of layers' inputs, F of gradients.

They are computed for as many layers at a time as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.calibration import CalibrationBatch, Grams, calibration_batches, run
from hf_condlr.errors import ConfigError, ConversionError, require
from hf_condlr.layers import weight_matrix
from hf_condlr.linalg.precision import at_least_float32


class SecondMoments(NamedTuple):
    """Second moments of a layer's inputs and of the gradients at its outputs; None if not measured."""

    C: Tensor | None = None  # E[x xᵀ] (n, n)
    F: Tensor | None = None  # E[Σ g gᵀ] (m, m)


class Calibration:
    """Second moments of a dense model's layers over calibration data.

    Args:
        model: The dense model.
        config: C is measured for `activation_aware` and `fisher`, F for `fisher` only.
        data: Batches, as `input_covariances` takes them; None if the config needs none.
        max_bytes: Memory for the matrices that are held at a time. If all need more, layers take turns, and the model
            runs over the data again in each turn.

    Raises:
        ConfigError: Data are missing or superfluous.
    """

    def __init__(
        self, model: nn.Module, config: CondLRConfig, data: Iterable[Any] | None, *, max_bytes: int = 4 * 2**30
    ) -> None:
        needed, given = config.needs_calibration_data, data is not None
        require(
            needed == given,
            "calibration_data is what 'activation_aware' and 'fisher' need, and nothing else",
            received=f"init_weights={config.init_weights!r}, rank_allocation={config.rank_allocation!r}, "
            f"{'with' if given else 'no'} calibration_data",
            remedy="Pass calibration_data=data_loader too." if needed else "Drop it, or choose one of them.",
            error=ConfigError,
        )
        self._model, self._max_bytes = model, max_bytes
        if data is not None and not hasattr(data, "__len__") and not hasattr(data, "dataset"):
            data = list(data)  # of a generator, since the data may be needed repeatedly
        self._data = data
        self._needs_fisher = "fisher" in (config.init_weights, config.rank_allocation)
        self._kept: dict[str, SecondMoments] = {}

    def second_moments(self, names: Iterable[str]) -> Iterator[tuple[str, SecondMoments]]:
        """Pairs of a layer's name and its second moments, in the order of the names.

        Raises:
            ConversionError: The data do not reach a layer, or the model has no logits to differentiate.
        """
        if self._data is None:
            yield from ((name, SecondMoments()) for name in names)
            return
        for turn in self._turns(names):
            if not set(turn) <= set(self._kept):
                self._kept = {}
                covariances = input_covariances(self._model, turn, self._data)
                fishers = output_fisher(self._model, turn, self._data) if self._needs_fisher else {}
                self._kept = {name: SecondMoments(covariances[name], fishers.get(name)) for name in turn}
            yield from ((name, self._kept[name]) for name in turn)

    def _turns(self, names: Iterable[str]) -> list[list[str]]:
        """The names in groups whose float32 matrices fit into memory together, one layer at least in each."""
        groups: list[list[str]] = []
        left = 0
        for name in names:
            m, n = weight_matrix(self._model.get_submodule(name)).shape
            need = 4 * (n**2 + (m**2 if self._needs_fisher else 0))
            if need > left or not groups:
                groups.append([])
                left = self._max_bytes
            groups[-1].append(name)
            left -= need
        return groups


@torch.no_grad()
def input_covariances(model: nn.Module, names: Iterable[str], data: Iterable[Any]) -> dict[str, Tensor]:
    """C = E[x xᵀ], uncentred, of the inputs x of each named layer; tokens that a mask hides do not count.

    A convolution's x are its patches (c_in · k · k), unfolded batch by batch.

    Args:
        model: The dense model; it runs in evaluation mode.
        names: Linear, Conv1D or Conv2d layers of it.
        data: Batches: dicts, of which the model gets what its forward accepts, labels only where a decoder runs on
            them; tuples, whose first element is the input; or tensors. They are moved to the model's device.

    Returns:
        {name: C (n, n)}.

    Raises:
        ConversionError: No batch, one that the model does not accept, a layer that saw none, or an input that is not
            finite.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    grams, counts = Grams(layers, "the calibration data"), dict.fromkeys(layers, 0)
    pair: Any = model if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    encoder, decoder = (pair.get_encoder(), set(pair.get_decoder().modules())) if pair else (None, set())
    batch, encoded = CalibrationBatch((), {}), 0

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal encoded
        encoded = output[0].data_ptr()

    def record(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Where the decoder reads the encoder's output, the encoder's tokens count.
        reads_decoder = layer in decoder and args[0].data_ptr() != encoded
        rows = _rows(layer, args[0], batch.decoder_mask if reads_decoder else batch.mask)
        grams.add(name, rows)
        counts[name] += len(rows)

    hooks = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    if encoder is not None:
        hooks.append(encoder.register_forward_hook(remember))
    try:
        for batch in calibration_batches(model, data):  # the hooks read it
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return grams.means(counts)


def _rows(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:  # -> (tokens or patches, n)
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(at_least_float32(x), layer._reversed_padding_repeated_twice, mode=mode)
        x = nn.functional.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).mT
    elif mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


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

    def record(name: str, gradient: Tensor) -> None:  # (*, m), or (B, m, H, W)
        rows = gradient.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else gradient
        grams.add(name, rows.reshape(-1, rows.shape[-1]))

    def watch(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first one: nothing before it is differentiated
            output = output.detach().requires_grad_()
        output.register_hook(partial(record, name))
        return output.clone()  # activations may change it in place

    hooks = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
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
        return nn.functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
    return nn.functional.cross_entropy(
        logits, torch.multinomial(mean.softmax(-1), 1, generator=generator)[:, 0], reduction="sum"
    )


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
