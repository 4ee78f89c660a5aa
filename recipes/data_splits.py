"""The splits of a data set, read from the Hub, a folder or a file, whatever its rows hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import require
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


@dataclass
class DataArguments:
    """Which data, and how much of them."""

    dataset_name: str = field(metadata={"help": "Name on the Hub, a folder, or a file: parquet, csv or json."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set of several."})
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Held out of the training split where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many, for a try."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be ≥ 1", value)
        require(0 < self.validation_fraction < 1, "validation_fraction must lie in (0, 1)", self.validation_fraction)


def read_splits(name: str, config: str | None = None) -> DatasetDict:
    """The splits train, and where the data have them validation and test.

    Raises:
        ValueError: They cannot be read, one of them is empty, or there is none to train on.
    """
    reader, options = _reader(name)
    try:
        data = load_dataset(reader, **options) if options else load_dataset(name, config)
    except (ValueError, OSError, DatasetsError, StopIteration) as error:  # the last for an empty JSON file
        rule = f"{name} must be a data set that load_dataset reads, and none of its splits may be empty"
        raise ValueError(
            f"{rule}; received {type(error).__name__}: {error}. Name another, or mend its files."
        ) from error
    require("train" in data, "the data must have a split named train", list(data), "Name its files or folder train.")
    empty = [name for name, rows in data.items() if not len(rows)]
    require(not empty, "a split must have rows", f"none in {', '.join(empty)}", "Fill it, or take it away.")
    return DatasetDict({split: data[split] for split in ("train", "validation", "test") if split in data})


def _reader(name: str) -> tuple[str, Mapping[str, Any]]:
    """What `load_dataset` takes for a file; a text file is read by paragraphs, which blank lines part."""
    path = Path(name)
    if path.is_dir() and _holds_only_text(path):
        return "text", {"data_dir": name, "sample_by": "paragraph"}
    reader = READERS.get(path.suffix)
    if reader is None:
        return name, {}
    return reader, {"data_files": name} | ({"sample_by": "paragraph"} if reader == "text" else {})


def _holds_only_text(folder: Path) -> bool:
    """Whether all its files are .txt, at any depth: a license or a list of classes may lie beside other data."""
    files = (path for path in folder.rglob("*") if path.is_file())
    kinds = (path.suffix == ".txt" for path in files if path.name != "README.md" and not path.name.startswith("."))
    return next(kinds, False) and all(kinds)  # stops at the first other file of a large folder


def column(given: str | None, option: str, columns: Mapping[str, Any], candidates: list[str], kind: str) -> str:
    """The column that is named, or the only candidate of a kind."""
    if given is not None:
        require(given in columns, f"{option} must be one of {', '.join(columns)}", given)
        return given
    rule = f"the data must have one column of {kind}, or --{option} must name it"
    require(len(candidates) == 1, rule, candidates, f"The columns are {', '.join(columns)}.")
    return candidates[0]


def limit(data: DatasetDict, args: DataArguments) -> DatasetDict:
    """At most so many rows a split as the arguments say; the same ones whatever the training's seed."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    for split, most in limits.items():
        if most is not None and split in data and most < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(most))  # files often come sorted by class
    return data
