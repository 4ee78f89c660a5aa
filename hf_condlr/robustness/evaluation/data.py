"""`load_split`: the split of a data set to test a model on, from the Hub, a folder or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_condlr.errors import EvaluationError


def load_split(name: str | Path, config: str | None = None, split: str | None = None) -> Dataset:
    """A split with known labels: by default the test split, else the validation split, else the training split.

    Args:
        name: A data set's name on the Hub, a folder of images or parquet files, or a parquet file.
        config: Name of the configuration, where the data set has several.
        split: Name of the split.

    Raises:
        EvaluationError: There is no such split.
    """
    is_file = str(name).endswith(".parquet")
    data: Any = load_dataset("parquet", data_files=str(name)) if is_file else load_dataset(str(name), config)
    if split is not None and split not in data:
        raise EvaluationError(
            f"{name} has the splits {', '.join(data)}", received=f"split={split!r}", remedy="Name one of them."
        )
    known = [part for part in ("test", "validation", "train", *data) if part in data and not _secret(data[part])]
    return data[split or next(iter(known), next(iter(data)))]


def _secret(rows: Dataset) -> bool:
    """Whether the labels are secret: -1 everywhere, as in GLUE's test splits."""
    label = next((name for name in ("labels", "label") if name in rows.column_names), None)
    return label is not None and len(rows) > 0 and rows[0][label] == -1
