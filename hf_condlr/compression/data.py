"""Which rows do what: calibration and recovery see the training split only, all else is measured on other rows.

A row chooses the ratio or measures the result, never both, and neither was calibrated on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from hf_condlr.scripts.checks import check_data
from hf_condlr.scripts.dataset_arguments import DatasetArguments, with_source_rows

logger = logging.getLogger(__name__)
HELD_OUT = 0.15  # of the training split, where there is no other


@dataclass
class Splits:
    """The rows of each purpose, and in words where they come from."""

    train: Dataset
    evaluation: Dataset
    evaluation_name: str
    selection: Dataset | None = None
    """Rows that choose the ratio; None if it is given."""
    selection_name: str = ""


def load_data(data: Any, config: str | None) -> tuple[DatasetDict, str | None]:
    """The splits of `data` with the column `source_row`, and its name on the Hub.

    Raises:
        EvaluationError: It is no data set, or has no split to train on, or an empty one.
    """
    if isinstance(data, (str, Path)):
        arguments = DatasetArguments(dataset_name=str(data), dataset_config_name=config)
        return arguments.load(), arguments.hub_name
    if isinstance(data, Dataset):
        data = DatasetDict(train=data)
    is_data = isinstance(data, Mapping) and all(isinstance(rows, Dataset) for rows in data.values()) and len(data)
    remedy = "Give a datasets.DatasetDict with the splits train and validation or test, a name on the Hub, or a folder."
    check_data(bool(is_data), "data must be a data set", "none" if not data else type(data).__name__, remedy)
    return with_source_rows(data), None


def split(data: DatasetDict, *, choose_ratio: bool, seed: int) -> Splits:
    """Share the splits among the purposes.

    The result is measured on the test split if there is one, else on the validation split. A ratio is chosen on
    the validation split. Where one split would serve both, each gets half of its rows: not a part of the training
    split, which a trained model knows by heart. Without either, a part of the training split is held out for both.
    """
    train, others = data["train"], [name for name in ("test", "validation") if name in data]
    if not others:
        logger.warning("there is no split test or validation: %.0f %% of train is held out instead", 100 * HELD_OUT)
        rule, remedy = "there must be a split test or validation, or rows to hold out", "Give more rows."
        check_data(len(train) >= 20, rule, f"{len(train)} rows in train", remedy)
        parts = train.train_test_split(HELD_OUT, seed=seed)
        train, data, others = parts["train"], DatasetDict(held=parts["test"]), ["held"]
    words = {"held": "rows held out of train"}
    evaluation, name = data[others[0]], words.get(others[0], others[0])
    if not choose_ratio:
        return Splits(train, evaluation, name)
    if len(others) == 2:
        return Splits(train, evaluation, name, data[others[1]], others[1])
    check_data(len(evaluation) >= 2, f"{name} must have rows for two purposes", len(evaluation), "Add a split.")
    halves = evaluation.train_test_split(0.5, seed=seed)
    return Splits(train, halves["train"], f"half of {name}", halves["test"], f"the other half of {name}")


def data_digest(data: DatasetDict) -> str:
    """Identifies a data set well enough for a run to be resumed: columns, sizes, and 64 rows spread over each split."""
    digest = hashlib.sha256()
    for name, rows in sorted(data.items()):
        digest.update(f"{name} {len(rows)} {rows.features}".encode())
        few = rows.with_format("arrow").select(range(0, len(rows), max(1, len(rows) // 64)))[:]
        digest.update(repr(few.to_pylist()).encode())
    return digest.hexdigest()[:16]
