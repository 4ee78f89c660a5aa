"""The columns of a data set that a script trains on, and labels that mean the same class in every split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_condlr.errors import listed
from hf_condlr.scripts.checks import check_data

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset, DatasetDict


def is_string(feature: Any) -> bool:
    """Whether a feature of a data set holds texts, of either of Arrow's sizes."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def find_column(
    columns: Mapping[str, Any], option: str, given: str | None, matches: Callable[[str, Any], bool], kind: str
) -> str:
    """The column that an option names, or else the only one that matches.

    Args:
        columns: {name: feature} of a data set.
        option: Name of the option, for messages.
        given: Value of the option.
        matches: Whether a name and its feature are of the wanted kind.
        kind: Name of that kind, for messages.

    Raises:
        EvaluationError: No such column; or none or several match.
    """
    columns = {name: feature for name, feature in columns.items() if name != "source_row"}
    if given is not None:
        check_data(given in columns, f"{option} must be one of {', '.join(columns)}", repr(given), "Choose one.")
        return given
    found = [name for name, feature in columns.items() if matches(name, feature)]
    rule = f"the data must have one column of {kind}, or --{option} must name it"
    check_data(len(found) == 1, rule, ", ".join(found) or "none", f"The columns are {', '.join(columns)}.")
    return found[0]


def labelled(data: DatasetDict, label: str, inputs: Mapping[str, str]) -> DatasetDict:
    """Select the columns that are used, with labels as numbers of the training split's classes in every split.

    A test split whose labels are all -1 or missing, because they are secret, is left out.

    Args:
        data: Data set that `DatasetArguments.load` returned.
        label: The column of labels: class labels, texts or numbers, which become classes in sorted order.
        inputs: {column: its new name} of the other columns.

    Returns:
        The columns of `inputs`, `labels` and `source_row`.

    Raises:
        EvaluationError: The training split has less than two classes, or another split has a label that it does not
            have.
    """
    from datasets import ClassLabel, DatasetDict

    used = {**inputs, label: "labels", "source_row": "source_row"}
    secret = "test" in data and set(data["test"][label]) <= {-1, None}
    splits = {split: rows for split, rows in data.items() if split != "test" or not secret}
    data = DatasetDict(splits).select_columns(list(used)).rename_columns(used)
    feature, present = data["train"].features["labels"], set(data["train"]["labels"])
    if isinstance(feature, ClassLabel):
        numbers = {number: number for number in sorted(present & set(range(feature.num_classes)))}
    else:
        numbers = {value: number for number, value in enumerate(sorted(present - {None}))}
        feature = ClassLabel(names=[str(value) for value in numbers])
    classes = listed([feature.names[number] for number in numbers.values()])
    fractions = any(isinstance(value, float) and value % 1 for value in numbers)
    rule, remedy = "the training split must have two classes or more, not fractions", "Is this the column of labels?"
    check_data(len(numbers) >= 2 and not fractions, rule, classes, remedy)
    for split, rows in data.items():
        wrong = [
            f"{v!r} in {row}" for v, row in zip(rows["labels"], rows["source_row"], strict=True) if v not in numbers
        ]
        rule = f"labels of the {split} split must be classes of the training split, {classes}"
        check_data(not wrong, rule, listed(wrong), "Repair or remove the rows.")
        data[split] = with_labels(rows, [numbers[value] for value in rows["labels"]], feature)
    return data


def with_labels(rows: Dataset, labels: list[int], classes: ClassLabel) -> Dataset:
    """The rows with these class numbers in the column `labels`."""
    return rows.remove_columns("labels").add_column("labels", labels).cast_column("labels", classes)
