"""The rows of a data set: which are evaluated, what they hold, and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from PIL.Image import Image
from torch import Tensor

from hf_condlr.errors import EvaluationError, require

LABELS = ("labels", "label", "label_ids")
TEXTS = ("texts", "input_ids")  # kinds of rows for text attacks
# Pairs of columns that are both read without being named: in any other pair one may be an identifier.
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair")),
    *(("question", "sentence"), ("question", "passage"), ("question", "context"), ("text1", "text2")),
)


def choose(dataset: Any, max_samples: int | None, seed: int) -> list[int]:
    """Numbers of the rows to evaluate, ascending: all, or `max_samples` drawn with `seed`."""
    splits = ", ".join(map(str, dataset)) if isinstance(dataset, Mapping) else ""
    require(
        not splits,
        "a data set must be one split",
        received=splits,
        remedy="Choose one: data['test'].",
        error=EvaluationError,
    )
    require(
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"),
        "a data set must have a length and rows by number",
        received=type(dataset).__name__,
        remedy="Take rows out of a stream first: Dataset.from_list(list(stream.take(1000))).",
        error=EvaluationError,
    )
    require(
        max_samples is None or max_samples >= 1,
        "max_samples must be ≥ 1",
        received=max_samples,
        remedy="None evaluates all.",
        error=EvaluationError,
    )
    require(
        len(dataset),
        "the data set must hold at least one sample",
        received="none",
        remedy="Choose another split.",
        error=EvaluationError,
    )
    if max_samples is None or max_samples >= len(dataset):
        return list(range(len(dataset)))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_samples]
    return sorted(chosen.tolist())


def with_pictures(dataset: Any) -> Any:
    """The data set with images as Pillow images, where a format of `datasets` would give arrays."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] in (None, "custom"):
        return dataset
    has_images = any(isinstance(feature, datasets.Image) for feature in dataset.features.values())
    return dataset.with_format(None) if has_images else dataset


def recognise(
    row: Any, image_column: str | None, text_columns: Sequence[str] | None, label_column: Any
) -> tuple[str, list[Any]]:
    """The kind of the rows (see `Samples.kind`), and the columns of images or texts."""
    if not isinstance(row, Mapping):
        if isinstance(row, (tuple, list)) and len(row) == 2:
            return ("images", [0]) if isinstance(row[0], Image) else ("tensors", [])
        rule, remedy = (
            "a row must be a dictionary or a pair (pixels, label)",
            "Use `datasets`, or torch's TensorDataset.",
        )
        require(False, rule, received=type(row).__name__, remedy=remedy, error=EvaluationError)
    for name in [image_column] if image_column else [*(text_columns or [])]:
        require(
            name in row,
            "a column that is named must exist",
            received=name,
            remedy=f"Choose among {', '.join(row)}.",
            error=EvaluationError,
        )
    if image_column is None and text_columns is None:
        for kind in ("pixel_values", "input_ids"):
            if kind in row:
                return kind, []
    images = [image_column] if image_column else [name for name, value in row.items() if isinstance(value, Image)]
    texts = list(text_columns or [n for n, value in row.items() if isinstance(value, str) and n != label_column])
    if len(images) == 1 and text_columns is None:
        return "images", images
    known = text_columns or len(texts) == 1 or tuple(texts) in PAIRS
    require(
        1 <= len(texts) <= 2 and known and (text_columns or not images),
        "rows must hold one image or one text, or the two texts of a known pair",
        received=f"columns of images: {', '.join(images) or 'none'}; of texts: {', '.join(texts) or 'none'}",
        remedy="Name them with image_column or text_columns.",
        error=EvaluationError,
    )
    return "texts", texts


def class_numbers(rows: Sequence[Any], column: Any) -> Tensor:  # -> (B,), int64
    """The labels of rows.

    Raises:
        EvaluationError: They are not class numbers.
    """
    values = [row[column] for row in rows]
    try:
        labels = torch.as_tensor([value.item() if isinstance(value, Tensor) else value for value in values])
    except (TypeError, ValueError, RuntimeError):  # names, None, vectors
        labels = torch.empty(0)
    require(
        labels.dim() == 1 and not labels.is_floating_point(),
        "labels must be one class number a sample",
        received=f"values such as {str(values[0])[:50]}",
        remedy="Only classifiers of whole samples are attacked; class_encode_column makes numbers of names.",
        error=EvaluationError,
    )
    labels = labels.long()
    require(
        (labels >= 0).all(),
        "labels must be class numbers from 0",
        received=f"{labels.min().item()} in the column {column!r}",
        remedy="Evaluate a split whose labels are known, without rows that have none.",
        error=EvaluationError,
    )
    return labels
