"""Second moments C = E[x xᵀ] of the inputs of layers over calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.conversion.calibration import CalibrationBatch, Grams, calibration_batches, run
from hf_condlr.linalg.precision import at_least_float32


@torch.no_grad()
def input_covariances(model: nn.Module, names: Iterable[str], data: Iterable[Any]) -> dict[str, Tensor]:
    """C = E[x xᵀ], uncentred, of the inputs x of each named layer; tokens that a mask hides do not count.

    A convolution's x are its patches (c_in · k · k), unfolded batch by batch. The model runs in evaluation mode and
    without gradients.

    Args:
        model: The dense model.
        names: Linear, Conv1D or Conv2d layers of it.
        data: Batches, such as a data loader's: dicts, of which the model gets what its forward accepts, labels only
            where a decoder runs on them; tuples, whose first element is the input; or tensors. They are moved to the
            model's device.

    Returns:
        {name: C (n, n)}.

    Raises:
        ConversionError: No batch, one that the model does not accept, a layer that saw none, or an input that is not
            finite.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    grams, counts = Grams(layers, "the calibration data"), dict.fromkeys(layers, 0)
    masks = _Masks(model)

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(module, args[0], masks.of(module, args[0]))
            grams.add(name, rows)
            counts[name] += len(rows)

        return hook

    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    hooks += masks.hooks()
    try:
        for batch in calibration_batches(model, data):
            masks.batch = batch
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return grams.means(counts)


class _Masks:
    """Which rows of a layer's input count: a decoder's tokens are not those of the encoder whose output it reads."""

    def __init__(self, model: Any) -> None:
        self.batch = CalibrationBatch((), {})
        is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._encoder = model.get_encoder() if is_pair else None
        self._decoder = set(model.get_decoder().modules()) if is_pair else set()
        self._encoded: int | None = None

    def hooks(self) -> list[Any]:
        def remember(module: nn.Module, args: Any, output: Any) -> None:
            self._encoded = output[0].data_ptr()

        return [] if self._encoder is None else [self._encoder.register_forward_hook(remember)]

    def of(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        reads_decoder = layer in self._decoder and x.data_ptr() != self._encoded
        return self.batch.decoder_mask if reads_decoder else self.batch.mask


def _rows(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:  # -> (tokens, n), at least float32
    x = at_least_float32(x)
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, x)
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B · positions, c_in · k_h · k_w)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return patches.mT.reshape(-1, patches.shape[1])
