"""`DatasetArguments`: the options of a training script that read, split and check a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_condlr.errors import EvaluationError, listed
from hf_condlr.options import option
from hf_condlr.scripts.checks import check, check_data

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


@dataclass
class DatasetArguments:
    """Data: which, and how many of them."""

    dataset_name: str = field(
        metadata={"help": "Name on the Hub; a folder of images (train/cat/1.png) or of files (train.csv); or a file."}
    )
    dataset_config_name: str | None = option(None, "Configuration, where there are several.")
    validation_fraction: float = option(0.15, "Share of the training split to hold out where there is no validation.")
    max_train_samples: int | None = option(None, "Train on this many, for a try.")
    max_eval_samples: int | None = option(None, "Validate and test on this many, for a try.")
    skip_unreadable: bool = option(False, "Leave out rows that cannot be read, and count them, instead of stopping.")

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be ≥ 1", value, "Leave it out to take all.")
        share = self.validation_fraction
        check(0 < share < 1, "validation_fraction must lie in (0, 1)", share, "For example 0.15.")

    @property
    def hub_name(self) -> str | None:
        """Name of the data on the Hub; None for files."""
        return None if Path(self.dataset_name).exists() else self.dataset_name

    def load(self) -> DatasetDict:
        """The splits train and, where the data have them, validation and test; `source_row` says where each row is.

        Text files are read by paragraphs, which blank lines separate.

        Raises:
            EvaluationError: The splits cannot be read, one of them is empty, or there is none to train on.
        """
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        path = Path(self.dataset_name)
        by_paragraph = {"sample_by": "paragraph"}
        try:
            if path.suffix in READERS:
                options = by_paragraph if path.suffix == ".txt" else {}
                data = load_dataset(READERS[path.suffix], data_files=str(path), **options)
            elif path.is_dir() and _holds_only_text(path):
                data = load_dataset("text", data_dir=str(path), **by_paragraph)
            else:
                data = load_dataset(self.dataset_name, self.dataset_config_name)
        except (ValueError, OSError, DatasetsError, StopIteration) as error:  # the last for an empty JSON file
            cause = error.__cause__ or error
            message = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            rule = f"{path} must be a data set that load_dataset reads, without an empty split"
            raise EvaluationError(rule, received=message, remedy="Name another one, or repair its files.") from error
        return with_source_rows(data)

    def hold_out(self, data: DatasetDict, label: str | None = None) -> DatasetDict:
        """Add a validation split, keep at most as many rows as asked for; neither depends on the training's seed.

        Args:
            data: Data set that `load` returned.
            label: Column of classes, whose shares the held out part keeps.

        Raises:
            ValueError: There are too few rows, of one class or of all, to hold some out.
        """
        from datasets import DatasetDict

        if "validation" not in data:
            parts = data["train"].train_test_split(self.validation_fraction, seed=0, stratify_by_column=label)
            data = DatasetDict({**data, "train": parts["train"], "validation": parts["test"]})
        for split, rows in data.items():
            most = self.max_train_samples if split == "train" else self.max_eval_samples
            if most is not None and most < len(rows):
                data[split] = rows.shuffle(seed=0).take(most)  # files often come sorted by class
        return data


def with_source_rows(data: Mapping[str, Dataset]) -> DatasetDict:
    """The splits train, validation and test of a data set, with the column `source_row`, which says where each row is.

    Raises:
        EvaluationError: One of them is empty, or there is none to train on.
    """
    from datasets import DatasetDict

    check_data("train" in data, "the data must have a split named train", list(data), "Name its files or folder so.")
    empty = [name for name, rows in data.items() if not len(rows)]
    check_data(not empty, "a split must have rows", f"none in {', '.join(empty)}", "Fill it, or remove it.")
    splits = DatasetDict({split: data[split] for split in ("train", "validation", "test") if split in data})
    for split, rows in splits.items():
        if "source_row" not in rows.column_names:
            splits[split] = rows.add_column("source_row", [f"row {i} of the {split} split" for i in range(len(rows))])
    return splits


def readable_rows(
    data: DatasetDict, problem: Callable[[Any], str | None], *, skip: bool = False, processes: int = 0
) -> DatasetDict:
    """Check every row before anything is trained, and return the rows that can be used.

    Args:
        data: Splits with the column `source_row`.
        problem: Returns the fault of a row, and its file, or None; its results are cached.
        skip: Leave out and count the rows that are wrong.
        processes: Number of processes that check; 0 and 1: this one alone.

    Raises:
        EvaluationError: Rows are wrong, without `skip`; the message lists the first five.
    """
    wrong = []
    for split, rows in data.items():
        workers = processes if 1 < processes <= len(rows) else None
        checked = rows.map(
            lambda row: {"problem": problem(row) or ""}, remove_columns=rows.column_names, num_proc=workers
        )
        problems = checked["problem"]
        faults = [f"{text} in {place}" for text, place in zip(problems, rows["source_row"], strict=True) if text]
        if faults and skip:
            logger.warning("%d rows of the %s split are left out: %s", len(faults), split, listed(faults))
            data[split] = rows.select([i for i, text in enumerate(problems) if not text])
        wrong += faults
    remedy = "Repair or remove them, or leave them out with --skip_unreadable."
    check_data(skip or not wrong, "every row must be readable", listed(wrong), remedy)
    return data


def _holds_only_text(folder: Path) -> bool:
    """Whether all files are .txt, at any depth: a license or a list of classes may lie next to other data."""
    files = (path for path in folder.rglob("*.*") if path.name != "README.md" and not path.name.startswith("."))
    return {path.suffix for path in files if path.is_file()} == {".txt"}
