"""Calibration batches: what a model gets of one, and which tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_condlr.errors import CondLRError, ConversionError


@dataclass
class CalibrationBatch:
    """The arguments that a model's forward gets of a batch, on the model's device, and its masks.

    `kwargs` hold labels only for a decoder, which runs on them. The masks (B, T) say which tokens of the input and of
    the decoder count.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None = None
    mask: Tensor | None = None
    decoder_mask: Tensor | None = None


def calibration_batches(model: nn.Module, data: Iterable[Any]) -> Iterator[CalibrationBatch]:
    """Iterate over the data with a progress bar; until the end the model is in evaluation mode and frozen."""
    with frozen(model):
        for batch in tqdm(data, desc="calibration", disable=None):
            yield calibration_batch(model, batch)


def run(model: nn.Module, batch: CalibrationBatch) -> Any:
    """The model's output for a batch.

    Raises:
        ConversionError: The model does not accept the batch.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except CondLRError:
        raise
    except Exception as error:
        raise ConversionError(
            f"calibration_data must hold batches that the {type(model).__name__} accepts",
            received=f"{_described(batch.kwargs or batch.args[0])}: {type(error).__name__}: {error}",
            remedy="Pass a DataLoader with the collator that training uses.",
        ) from error


def calibration_batch(model: nn.Module, batch: Any) -> CalibrationBatch:
    """Pick what `model.forward` accepts from a batch: a mapping, a tuple with the input first, or a tensor.

    Raises:
        ConversionError: The batch holds no tensors, or nothing for the decoder of an encoder-decoder to run on.
    """
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        accepted = set(inspect.signature(model.forward).parameters)
        kwargs, labels = {k: moved(batch[k]) for k in batch if k in accepted - {"labels"}}, moved(batch.get("labels"))
        arguments = CalibrationBatch((), kwargs, labels if isinstance(labels, Tensor) else None)
        arguments.mask = _token_mask(kwargs.get("attention_mask"))
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        arguments = CalibrationBatch((moved(first),), {})
    if not any(isinstance(value, Tensor) for value in (*arguments.args, *arguments.kwargs.values())):
        raise ConversionError(
            "calibration_data must hold batches of tensors that the model's forward accepts",
            received=_described(batch),
            remedy="Pass a DataLoader with the collator that training uses, or processing_class with texts.",
        )
    if arguments.kwargs and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        _add_decoder_inputs(model, arguments, takes_labels="labels" in accepted)
    return arguments


def accepted(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward has."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(model.forward).parameters}


def skips_head(model: Any, layers: Iterable[nn.Module]) -> dict[str, int]:
    """An argument of forward by which a language model computes the logits of one token only, if it has one.

    Only where all the layers that are looked at lie in the base model, before tokens are dropped.
    """
    base = getattr(model, "base_model", None)
    if base is None or base is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": 1} if set(layers) <= set(base.modules()) else {}


def in_precision(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to the dtype on the model's device; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(next(model.parameters()).device.type, dtype)


def _add_decoder_inputs(model: Any, batch: CalibrationBatch, *, takes_labels: bool) -> None:
    """Let the decoder run on the labels, which the model shifts by itself; those of -100 do not count."""
    has_inputs = "decoder_input_ids" in batch.kwargs or "decoder_inputs_embeds" in batch.kwargs
    batch.decoder_mask = _token_mask(batch.kwargs.get("decoder_attention_mask"))
    labels = batch.labels
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        batch.decoder_mask = labels != -100 if batch.decoder_mask is None else batch.decoder_mask
        if takes_labels and not has_inputs:
            batch.kwargs["labels"] = labels
            has_inputs = True
    if not has_inputs and model.can_generate():
        raise ConversionError(
            "calibration batches of an encoder-decoder must hold what its decoder runs on",
            received="neither labels nor decoder_input_ids",
            remedy="Let the collator add labels, as DataCollatorForSeq2Seq does.",
        )


def _token_mask(mask: Any) -> Tensor | None:  # (B, T) bool
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_described(value)}" for key, value in batch.items()) or "an empty batch"
    return f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters; afterwards every module and parameter is as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
