"""One pass over calibration data: second moments of layers' inputs, and of the gradients at their outputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.conversion.calibration import CalibrationBatch, calibration_batches, in_precision, run, skips_head
from hf_condlr.conversion.grams import Gram
from hf_condlr.conversion.predictions import likelihood, predicted_logits, sampled_gradient
from hf_condlr.errors import ConversionError
from hf_condlr.layers import weight_matrix
from hf_condlr.linalg.precision import at_least_float32

Grams = dict[str, Gram]


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
    return {name: gram.mean() for name, gram in measure(model, names, data)[0].items()}


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
    return {name: gram.mean() for name, gram in measure(model, names, data, inputs=False, gradients=True)[1].items()}


def measure(
    model: nn.Module,
    names: Iterable[str],
    data: Iterable[Any],
    *,
    inputs: bool = True,
    gradients: bool = False,
    autocast: torch.dtype | None = None,
) -> tuple[Grams, Grams]:
    """`input_covariances`, `output_fisher` or both from one pass; layers with the same inputs get the same matrix.

    Layers have the same inputs if in every call they see the same memory, alive and unchanged: its Gram matrix is
    computed for the first of them only. Where that holds in the first batches and not in a later one, the pass begins
    anew without it, so `data` must be iterable again.
    """
    apart: set[str] = set()
    while True:
        watch = _Pass(model, names, apart)
        try:
            watch.over(data, inputs=inputs, gradients=gradients, autocast=autocast)
        except _NotShared as unshared:
            apart |= unshared.names
            continue
        found = watch.inputs if inputs else {}, watch.gradients if gradients else {}
        for grams, quantity in zip(found, ("the calibration data", "the gradient of the predictions"), strict=True):
            require_values(grams, quantity)
        return found


class _NotShared(BaseException):  # no model's `except Exception` catches it
    """Layers with the same inputs so far have different ones now."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


class _Pass:
    """Hooks on the named layers, and what they add up while the model runs over the data."""

    def __init__(self, model: nn.Module, names: Iterable[str], apart: set[str]) -> None:
        self.model: Any = model
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        shapes = {name: weight_matrix(layer).shape for name, layer in self.layers.items()}
        self.inputs = {name: Gram(n) for name, (_, n) in shapes.items()}
        self.gradients = {name: Gram(m) for name, (m, _) in shapes.items()}
        self.batch = CalibrationBatch((), {})
        self.shared = _SharedInputs(apart)
        self.rows = dict.fromkeys(self.layers, 0)
        self.encoded = 0  # where the encoder's output lies
        is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        pair: Any = model if is_pair else None
        self.encoder: nn.Module | None = pair.get_encoder() if is_pair else None
        self.decoder = set(pair.get_decoder().modules()) if is_pair else set()

    def over(self, data: Iterable[Any], *, inputs: bool, gradients: bool, autocast: torch.dtype | None) -> None:
        """Run the model over the data; the counts are set at the end."""
        hooks: list[Any] = []
        for name, layer in self.layers.items():
            if inputs:
                hooks.append(layer.register_forward_pre_hook(partial(self._record_inputs, name)))
            if gradients:
                hooks.append(layer.register_forward_hook(partial(self._watch_output, name)))
        if self.encoder is not None:
            hooks.append(self.encoder.register_forward_hook(self._remember_encoded))
        samples, generator = 0, None
        without_head = {} if gradients else skips_head(self.model, self.layers.values())
        try:
            with torch.set_grad_enabled(gradients):
                for batch in calibration_batches(self.model, data):
                    self.batch = batch
                    batch.kwargs |= without_head if batch.kwargs else {}
                    with in_precision(self.model, autocast):
                        output = run(self.model, batch)
                    if gradients:
                        problem = likelihood(self.model, batch)
                        logits = predicted_logits(output, batch, problem)
                        generator = generator or torch.Generator(logits.device).manual_seed(0)
                        logits.backward(sampled_gradient(logits, problem, generator))
                        samples += len(logits)
        finally:
            for hook in hooks:
                hook.remove()
        for gram in self.gradients.values():
            gram.count = samples
        self._set_input_counts()

    def _set_input_counts(self) -> None:
        for name, leader in self.shared.leaders.items():
            if self.rows[name] != self.rows[leader]:
                raise _NotShared({name})
            self.inputs[name] = self.inputs[leader]
            self.inputs[name].count = self.rows[name]

    def _remember_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self.encoded = output[0].data_ptr()

    def _record_inputs(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Where the decoder reads the encoder's output, the encoder's tokens count.
        reads_decoder = layer in self.decoder and args[0].data_ptr() != self.encoded
        rows = layer_rows(layer, args[0].detach(), self.batch.decoder_mask if reads_decoder else self.batch.mask)
        self.rows[name] += len(rows)
        if isinstance(layer, nn.Conv2d) or self.shared.leader(name, args[0]) == name:  # patches are not compared
            self.shared.leaders.setdefault(name, name)
            self.inputs[name].add(rows)

    def _watch_output(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first one: nothing before it is differentiated
            output = output.detach().requires_grad_()
        output.register_hook(partial(self._record_gradient, name))
        return output.clone()  # activations may change it in place

    def _record_gradient(self, name: str, gradient: Tensor) -> None:  # (*, m), or (B, m, H, W)
        rows = gradient.movedim(1, -1) if isinstance(self.layers[name], nn.Conv2d) else gradient
        self.gradients[name].add(rows.reshape(-1, rows.shape[-1]))


class _SharedInputs:
    """Which layers read the same tensor in every call: `leaders` has the first of them for each."""

    def __init__(self, apart: set[str]) -> None:
        self.leaders: dict[str, str] = {}
        self._apart = apart
        self._seen: list[tuple[weakref.ref[Tensor], int, str]] = []  # only while it lives is its memory its own

    def leader(self, name: str, x: Tensor) -> str:
        """The layer whose Gram matrix has x in it already, or the layer itself.

        Raises:
            _NotShared: The layer shared its inputs so far, and these are others.
        """
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        found = None
        for reference, version, first in self._seen:
            other = reference()
            if other is not None and version == x._version and _same_memory(x, other):
                found = first
                break
        if found is None:
            self._seen.append((weakref.ref(x), x._version, name))
        leader = self.leaders.setdefault(name, name if name in self._apart or found is None else found)
        if leader not in (name, found):
            raise _NotShared({name})
        return leader


def _same_memory(x: Tensor, y: Tensor) -> bool:
    is_same = x.data_ptr() == y.data_ptr() and x.device == y.device
    return is_same and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def require_values(grams: Grams, quantity: str) -> None:
    """Require that each Gram matrix has a mean; `quantity` says in errors what its rows are."""
    for name, gram in grams.items():
        if received := gram.obstacle():
            raise ConversionError(
                f"{quantity} must reach {name!r} and be finite",
                received=received,
                remedy="Pass batches that the model accepts, or put the layer in exclude_modules.",
            )


def layer_rows(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:  # -> (tokens or patches, n)
    """The rows of a layer's input that count: tokens that the mask leaves, or the patches of a convolution."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(at_least_float32(x), layer._reversed_padding_repeated_twice, mode=mode)
        x = nn.functional.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).mT
    elif mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
