"""Second moments C = E[x xᵀ] of the inputs of layers over calibration data, for the starts that are aware of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_condlr.errors import ConversionError


def input_covariances(
    model: nn.Module, names: Iterable[str], data: Iterable[Any], *, max_bytes: int = 4 * 2**30
) -> dict[str, Tensor]:  # {name: (n, n)}
    """C = E[x xᵀ], uncentred, of the inputs x of each named layer; tokens that the attention mask hides do not count.

    A convolution's x are its patches (c_in · k · k), unfolded batch by batch. The model runs in evaluation mode and
    without gradients.

    Args:
        model: The dense model.
        names: Linear, Conv1D or Conv2d layers of it.
        data: Batches, such as a data loader's: dicts, of which the model gets what its forward accepts but the
            labels; tuples, whose first element is the input; or tensors. They are moved to the model's device.
        max_bytes: Memory for the matrices; where they need more, layers take turns and the data is gone over again.

    Raises:
        ConversionError: No batch, a layer that saw none, or an input that is not finite.
    """
    return in_turns(model, names, data, _width, _one_pass, max_bytes)


def in_turns(
    model: nn.Module,
    names: Iterable[str],
    data: Iterable[Any],
    width: Callable[[Any], int],
    one_pass: Callable[[nn.Module, dict[str, Any], Iterable[Any]], dict[str, Tensor]],
    max_bytes: int,
) -> dict[str, Tensor]:
    """A square matrix for each layer, as many in one pass over the data as fit into `max_bytes`."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    batches = repeatable(data)
    matrices: dict[str, Tensor] = {}
    for turn in _turns({name: width(layer) for name, layer in layers.items()}, max_bytes):
        matrices.update(one_pass(model, {name: layers[name] for name in turn}, batches))
    return matrices


def repeatable(data: Iterable[Any]) -> Iterable[Any]:
    """Data that can be gone over again: a loader or a sequence as it is, a generator as a list."""
    return data if hasattr(data, "__len__") or hasattr(data, "dataset") else list(data)


def _turns(widths: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in groups whose float32 matrices (width, width) fit into memory together."""
    groups: list[list[str]] = []
    left = 0
    for name, width in widths.items():
        need = 4 * width**2
        if need > left or not groups:
            groups.append([])
            left = max_bytes
        groups[-1].append(name)
        left -= need
    return groups


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module is put back into the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _width(layer: Any) -> int:  # n
    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel()
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]  # Conv1D is stored transposed


@torch.no_grad()
def _one_pass(model: nn.Module, layers: dict[str, Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    mask: Tensor | None = None

    def record(name: str, layer: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, args[0], mask)
            sums[name] = sums[name] + rows.mT @ rows if name in sums else rows.mT @ rows
            counts[name] += len(rows)

        return hook

    hooks = [layer.register_forward_pre_hook(record(name, layer)) for name, layer in layers.items()]
    try:
        with evaluated(model):
            for batch in tqdm(batches, desc="calibration", disable=None):
                args, kwargs, mask = model_arguments(model, batch)
                model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _mean(name, sums, counts) for name in layers}


def _mean(name: str, sums: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
    received = "none" if not counts[name] else None
    if received is None and not torch.isfinite(sums[name]).all():
        received = "values that are not finite"
    if received:
        raise ConversionError(
            f"calibration data must reach {name!r} with finite inputs",
            received=received,
            remedy="Pass batches that the model accepts, or put the layer in exclude_modules.",
        )
    return sums[name] / counts[name]


def _rows(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:  # -> (tokens, n), at least float32
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, x)
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B · positions, c_in · k_h · k_w)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return patches.mT.reshape(-1, patches.shape[1])


def model_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Positional and keyword arguments on the model's device, and the attention mask where it is (B, T)."""
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if not isinstance(batch, Mapping):
        return (moved(batch[0] if isinstance(batch, (tuple, list)) else batch),), {}, None
    accepted = set(inspect.signature(model.forward).parameters) - {"labels"}
    kwargs = {key: moved(value) for key, value in batch.items() if key in accepted}
    mask = kwargs.get("attention_mask")
    return (), kwargs, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
