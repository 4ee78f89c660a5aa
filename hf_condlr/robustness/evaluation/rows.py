"""A data set and its rows: which are evaluated, what they hold, their images, labels and classes."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from hf_condlr import errors

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

LABELS = ("labels", "label", "label_ids")
TEXTS = ("texts", "input_ids")  # kinds of rows for text attacks
# Pairs of columns that are both read without being named: in any other pair one may be an identifier.
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair")),
    *(("question", "sentence"), ("question", "passage"), ("question", "context"), ("text1", "text2")),
)
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB")


def require(condition: object, rule: str, received: object, remedy: str) -> None:
    """`errors.require` with `EvaluationError`."""
    errors.require(condition, rule, received=received, remedy=remedy, error=errors.EvaluationError)


def load_split(name: str | Path, config: str | None = None, split: str | None = None) -> datasets.Dataset:
    """A split with known labels: by default the test split, else the validation split, else the training split.

    Args:
        name: A data set's name on the Hub, a folder of images or parquet files, or a parquet file.
        config: Name of the configuration, where the data set has several.
        split: Name of the split.

    Raises:
        EvaluationError: There is no such split.
    """
    import datasets

    is_file = str(name).endswith(".parquet")
    data: Any = (
        datasets.load_dataset("parquet", data_files=str(name)) if is_file else datasets.load_dataset(str(name), config)
    )
    rule = f"{name} has the splits {', '.join(data)}"
    require(split is None or split in data, rule, f"split={split!r}", "Name one of them.")
    known = [part for part in ("test", "validation", "train", *data) if part in data and not _secret(data[part])]
    return data[split or next(iter(known), next(iter(data)))]


def _secret(rows: datasets.Dataset) -> bool:
    """Whether the labels are secret: -1 everywhere, as in GLUE's test splits."""
    label = next((name for name in ("labels", "label") if name in rows.column_names), None)
    return label is not None and len(rows) > 0 and rows[0][label] == -1


def choose(dataset: Any, max_samples: int | None, seed: int) -> list[int]:
    """Numbers of the rows to evaluate, ascending: all, or `max_samples` drawn with `seed`."""
    splits = ", ".join(map(str, dataset)) if isinstance(dataset, Mapping) else ""
    require(not splits, "a data set must be one split", splits, "Choose one: data['test'].")
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    remedy = "Take rows out of a stream first: Dataset.from_list(list(stream.take(1000)))."
    require(by_number, "a data set must have a length and rows by number", type(dataset).__name__, remedy)
    positive = max_samples is None or max_samples >= 1
    require(positive, "max_samples must be ≥ 1", max_samples, "None evaluates all.")
    require(len(dataset), "the data set must hold at least one sample", "none", "Choose another split.")
    if max_samples is None or max_samples >= len(dataset):
        return list(range(len(dataset)))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_samples]
    return sorted(chosen.tolist())


def with_pictures(dataset: Any) -> Any:
    """The data set with images as Pillow images, where a format of `datasets` would give arrays."""
    datasets = sys.modules.get("datasets")  # where it is not imported, there is no data set of it
    if datasets is None or not isinstance(dataset, datasets.Dataset) or dataset.format["type"] in (None, "custom"):
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
        rule, remedy = "a row must be a dictionary or a pair (pixels, label)", "Use `datasets`, or a TensorDataset."
        require(False, rule, type(row).__name__, remedy)
    for name in [image_column] if image_column else [*(text_columns or [])]:
        require(name in row, "a column that is named must exist", name, f"Choose among {', '.join(row)}.")
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
        f"columns of images: {', '.join(images) or 'none'}; of texts: {', '.join(texts) or 'none'}",
        "Name them with image_column or text_columns.",
    )
    return "texts", texts


def class_numbers(rows: Sequence[Any], column: Any) -> Tensor:  # -> (B,), int64
    """The labels of rows, which must be class numbers."""
    values = [row[column] for row in rows]
    try:
        labels = torch.as_tensor([value.item() if isinstance(value, Tensor) else value for value in values])
    except (TypeError, ValueError, RuntimeError):  # names, None, vectors
        labels = torch.empty(0)
    require(
        labels.dim() == 1 and not labels.is_floating_point(),
        "labels must be one class number a sample",
        f"values such as {str(values[0])[:50]}",
        "Only models that give one class per sample are attacked; class_encode_column makes numbers of names.",
    )
    least, remedy = labels.min().item(), "Evaluate a split whose labels are known, without rows that have none."
    require(least >= 0, "labels must be class numbers from 0", f"{least} in the column {column!r}", remedy)
    return labels.long()


def as_8_bit(image: Image, channels: int | None) -> Image:
    """The image in 8 bits with one or three channels: those of the model, or (None) grey for grey images, else RGB.

    Pillow's own conversion cuts 16-bit values off at 255 and integer parts off floats: 16 bits are divided by 257 here.

    Raises:
        EvaluationError: The range of the image's values is not known: 32-bit integers or floats.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    rule, received = "images must have 8 or 16 bits a channel, whose range is known", f"Pillow's mode {image.mode}"
    remedy = "Scale its values to 0 to 255 first: PIL.Image.fromarray(values.astype('uint8'))."
    require(image.mode in EIGHT_BIT, rule, received, remedy)
    mode = {1: "L", 3: "RGB"}.get(channels or 0, "L" if image.mode in ("L", "1") else "RGB")
    return image.convert(mode)


def match_classes(model: Any, dataset: Any, label_column: Any) -> list[int] | None:
    """The model's class number for each class number of the data set; None where the numbers agree.

    Without names on both sides, or without a common name, numbers are taken to agree.

    Raises:
        EvaluationError: Some names agree, but neither their order nor all of them.
    """
    theirs, ours = _model_names(model), _data_names(dataset, label_column)
    if not theirs or not ours or list(map(plain_name, ours)) == list(map(plain_name, theirs))[: len(ours)]:
        return None
    numbers = {plain_name(name): i for i, name in enumerate(theirs)}
    matched = [numbers.get(plain_name(name), -1) for name in ours]
    both = f"{errors.listed(theirs)} for the model, {errors.listed(ours)} for the data set"
    known = [(i, j) for i, j in enumerate(matched) if j >= 0]
    if all(i == j for i, j in known):  # other words for the same classes, such as neg and NEGATIVE
        logger.warning("Classes have different names, and are matched by their numbers: %s.", both)
        return None
    require(
        len(known) == len(ours) and len(set(matched)) == len(ours),
        "the classes of the model and of the data set must be the same, or in the same order",
        both,
        "Set model.config.id2label to the classes that the model was trained on.",
    )
    logger.warning("Classes are in another order, and are matched by their names: %s.", both)
    return matched


def class_names(config: Any) -> list[str]:
    """The classes of a model's config, in the order of their numbers."""
    names = getattr(config, "id2label", None)
    return [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else []


def _model_names(model: Any) -> Sequence[str]:
    values = class_names(getattr(model, "config", None))
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in values) else values


def _data_names(dataset: Any, label_column: Any) -> Sequence[str]:
    features = getattr(dataset, "features", None) or {}
    columns = [name for name in (label_column, *LABELS) if hasattr(features.get(name), "names")]  # a ClassLabel
    return features[columns[0]].names if columns else getattr(dataset, "classes", None) or []


def plain_name(name: str) -> str:
    """A class name as it is compared: without case, and any of spaces, `_` and `-` as one space."""
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()
