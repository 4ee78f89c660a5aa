"""`DatasetArguments`: the options of a training script that read, split and check a data set."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from hf_condlr.errors import ConfigError, EvaluationError, listed, require

logger = logging.getLogger(__name__)
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
UNREADABLE = (ValueError, OSError, DatasetsError, StopIteration)  # the last for an empty JSON file


@dataclass
class DatasetArguments:
    """Data: which, and how many of them."""

    dataset_name: str = field(
        metadata={"help": "Name on the Hub; a folder of images (train/cat/1.png) or of files (train.csv); or a file."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration, where there are several."})
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Share of the training split that is held out where there is no validation."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on this many, for a try."})
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be read, and count them, instead of stopping."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} must be ≥ 1", value, "Leave it out to take all.")
        share = self.validation_fraction
        _check(0 < share < 1, "validation_fraction must lie in (0, 1)", share, "0.15, say.")

    @property
    def hub_name(self) -> str | None:
        """Name of the data on the Hub; None for files."""
        return None if Path(self.dataset_name).exists() else self.dataset_name

    def load(self) -> DatasetDict:
        """The splits train and, where the data have them, validation and test; `source_row` says where each row is.

        Raises:
            EvaluationError: They cannot be read, one of them is empty, or there is none to train on.
        """
        path = Path(self.dataset_name)
        try:
            if path.suffix in READERS:
                data = _read(path)
            elif path.is_dir() and _holds_only_text(path):
                data = load_dataset("text", data_dir=str(path), sample_by="paragraph")
            else:
                data = load_dataset(self.dataset_name, self.dataset_config_name)
        except UNREADABLE as error:
            self._explain(error)
        _require("train" in data, "the data must have a split named train", list(data), "Name its files or folder so.")
        empty = [name for name, rows in data.items() if not len(rows)]
        _require(not empty, "a split must have rows", f"none in {', '.join(empty)}", "Fill it, or remove it.")
        splits = {split: data[split] for split in ("train", "validation", "test") if split in data}
        return DatasetDict(
            {split: rows.add_column("source_row", _places(split, len(rows))) for split, rows in splits.items()}
        )

    def _explain(self, error: Exception) -> NoReturn:
        """Name the file that cannot be read, where the data are files."""
        cause = error.__cause__ or error
        message = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        for file in sorted(Path(self.dataset_name).rglob("*")):
            if file.suffix in READERS:
                try:
                    _read(file)
                except UNREADABLE:
                    message += f" in {file}"
                    break
        rule = f"{self.dataset_name} must be a data set that load_dataset reads, without an empty split"
        raise EvaluationError(rule, received=message, remedy="Name another one, or mend its files.") from error

    def hold_out(self, data: DatasetDict, label: str | None = None) -> DatasetDict:
        """With a validation split, and at most as many rows as asked for; neither depends on the training's seed.

        Args:
            data: What `load` returned.
            label: Column of classes, of which the held out part keeps the shares.

        Raises:
            EvaluationError: There is too little to hold out.
        """
        train = data["train"]
        if "validation" not in data:
            remedy = "Give a validation split, or more rows."
            if label is not None:
                names = train.features[label].names
                rare = [names[c] for c, count in Counter(train[label]).items() if count == 1]
                _require(not rare, "a class needs two rows or more for a validation split", listed(rare), remedy)
            try:
                parts = train.train_test_split(self.validation_fraction, seed=0, stratify_by_column=label)
            except ValueError as error:  # too few rows for so many classes
                rule, remedy = "a validation split must be held out", f"{error} Change validation_fraction. {remedy}"
                raise EvaluationError(rule, received=f"{len(train)} rows", remedy=remedy) from error
            data = DatasetDict({**data, "train": parts["train"], "validation": parts["test"]})
        limits = {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_eval_samples}
        for split, rows in data.items():
            most = limits[split]
            if most is not None and most < len(rows):
                data[split] = rows.shuffle(seed=0).select(range(most))  # files often come sorted by class
        return data

    def drop_unreadable(
        self, data: DatasetDict, problem: Callable[[Any], str | None], *, processes: int = 0
    ) -> DatasetDict:
        """Check every row before anything is trained.

        Args:
            data: Splits with the column `source_row`.
            problem: What is wrong with a row, and in which file, or None; its results are cached.
            processes: Number of processes that check; 0 and 1: this one alone.

        Raises:
            EvaluationError: A row is wrong, and `skip_unreadable` is not set; or no row is left.
        """
        for split, rows in data.items():
            workers = processes if 1 < processes <= len(rows) else None
            checked = rows.map(
                lambda row: {"problem": problem(row) or ""}, remove_columns=rows.column_names, num_proc=workers
            )
            problems = list(checked["problem"])
            wrong = [i for i, text in enumerate(problems) if text]
            if not wrong:
                continue
            first = f"{problems[wrong[0]]} in {rows['source_row'][wrong[0]]}"
            remedy = "Mend or remove them, or leave them out with --skip_unreadable."
            _require(self.skip_unreadable, "every row must be readable", f"{len(wrong)} that are not: {first}", remedy)
            logger.warning("%d of %d rows of the %s split are left out: %s", len(wrong), len(rows), split, first)
            _require(len(wrong) < len(rows), "a split must have rows that can be read", first, "Mend them.")
            data[split] = rows.select([i for i, text in enumerate(problems) if not text])
        return data


def _read(path: Path) -> DatasetDict:
    """A file; one of text by paragraphs, which blank lines separate."""
    reader = READERS[path.suffix]
    return load_dataset(reader, data_files=str(path), **({"sample_by": "paragraph"} if reader == "text" else {}))


def _places(split: str, number: int) -> list[str]:
    """What messages call the rows of a split, also after a part of them was held out."""
    return [f"row {i} of the {split} split" for i in range(number)]


def _holds_only_text(folder: Path) -> bool:
    """Whether all files are .txt, at any depth: a license or a list of classes may lie beside other data."""
    files = (path for path in folder.rglob("*") if path.is_file())
    kinds = (path.suffix == ".txt" for path in files if path.name != "README.md" and not path.name.startswith("."))
    return next(kinds, False) and all(kinds)  # stops at the first other file of a large folder


def _check(valid: bool, rule: str, received: object, remedy: str) -> None:
    require(valid, rule, received=received, remedy=remedy, error=ConfigError)


def _require(valid: bool, rule: str, received: object, remedy: str) -> None:
    require(valid, rule, received=received, remedy=remedy, error=EvaluationError)
