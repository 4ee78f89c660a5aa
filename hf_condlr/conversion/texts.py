"""Texts, images and rows of a Dataset as calibration batches, by a tokenizer or processor."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import DataCollatorWithPadding, default_data_collator

from hf_condlr.errors import ConversionError, require

BATCH_SIZE = 8
MAX_LENGTH = 512  # tokens of a text, where the tokenizer's own limit is not smaller


def as_batches(data: Iterable[Any], processing_class: Any = None) -> Iterable[Any]:
    """Batches that can be read repeatedly.

    Args:
        data: Without `processing_class` batches, which stay as they are. With it texts, images, or rows (a
            `datasets.Dataset`) that hold either the model's inputs or one column of texts or images.
        processing_class: A tokenizer, image processor or processor, as for transformers' Trainer. Texts are padded,
            and cut at its limit or 512 tokens; batches hold eight.

    Raises:
        ConversionError: There is a `processing_class`, and the data are nothing that it processes.
    """
    if processing_class is None:
        # A list of a generator, since the data may be needed repeatedly.
        return data if hasattr(data, "__len__") or hasattr(data, "dataset") else list(data)
    if getattr(processing_class, "pad_token", "") is None:
        processing_class = copy.deepcopy(processing_class)
        processing_class.pad_token = processing_class.eos_token  # the mask hides it
    entries = _entries(list(data), processing_class)
    return [_batch(entries[i : i + BATCH_SIZE], processing_class) for i in range(0, len(entries), BATCH_SIZE)]


def _entries(data: list[Any], processing_class: Any) -> list[Any]:
    """Texts, images, or rows with the model's inputs only."""
    first, received = (data[0], type(data[0]).__name__) if data else ("", "nothing")
    if isinstance(first, Mapping):
        received = f"rows with {', '.join(f'{key}: {type(value).__name__}' for key, value in first.items())}"
        inputs = {*processing_class.model_input_names, "label", "labels"} & set(first)
        if inputs - {"label", "labels"}:
            return [{key: row[key] for key in inputs} for row in data]
        columns = [key for key, value in first.items() if _is_raw(value)]
        data = [row[columns[0]] for row in data] if len(columns) == 1 else [None]
    rule = "with processing_class calibration_data must hold texts, images, or rows with one column of them"
    remedy = "Choose the column with Dataset.select_columns, or pass batches without processing_class."
    require(all(map(_is_raw, data)), rule, received=received, remedy=remedy, error=ConversionError)
    return [entry for entry in data if not isinstance(entry, str) or entry.strip()]


def _is_raw(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "getbands")  # an image of PIL


def _batch(entries: list[Any], processing_class: Any) -> dict[str, Any]:
    if isinstance(entries[0], str):
        length = min(MAX_LENGTH, getattr(processing_class, "model_max_length", MAX_LENGTH))
        return dict(
            processing_class(text=entries, padding=True, truncation=True, max_length=length, return_tensors="pt")
        )
    if isinstance(entries[0], Mapping):
        has_pad = hasattr(processing_class, "pad") and "input_ids" in entries[0]
        return dict((DataCollatorWithPadding(processing_class) if has_pad else default_data_collator)(entries))
    return dict(processing_class(images=[image.convert("RGB") for image in entries], return_tensors="pt"))
