"""The columns of a data set that a script trains on, and labels that mean the same class in every split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from hf_condlr.errors import EvaluationError, listed, require


def find_column(
    columns: Mapping[str, Any], option: str, given: str | None, matches: Callable[[str, Any], bool], kind: str
) -> str:
    """The column that an option names, or else the only one that matches.

    Args:
        columns: {name: feature} of a data set.
        option: Name of the option, for messages.
        given: Its value.
        matches: Whether a name and its feature are of the kind that is looked for.
        kind: For messages.

    Raises:
        EvaluationError: No such column; or none or several match.
    """
    columns = {name: feature for name, feature in columns.items() if name != "source_row"}
    if given is not None:
        _require(given in columns, f"{option} must be one of {', '.join(columns)}", repr(given), "Choose one.")
        return given
    found = [name for name, feature in columns.items() if matches(name, feature)]
    rule = f"the data must have one column of {kind}, or --{option} must name it"
    _require(len(found) == 1, rule, ", ".join(found) or "none", f"The columns are {', '.join(columns)}.")
    return found[0]


def labelled(data: DatasetDict, label: str, inputs: Mapping[str, str]) -> DatasetDict:
    """Select the columns that are used, with labels as numbers of the training split's classes in every split.

    A test split without labels, or with -1 in all of its rows, has secret ones and is left out.

    Args:
        data: What `DatasetArguments.load` returned.
        label: The column of labels.
        inputs: {column: the name that it gets} of the others.

    Returns:
        The columns of `inputs`, `labels` and `source_row`.

    Raises:
        EvaluationError: A column is missing, the training split has less than two classes, or another split has a label
            that it does not have.
    """
    used = {**inputs, label: "labels", "source_row": "source_row"}
    if "test" in data and (label not in data["test"].column_names or set(data["test"][label]) <= {-1, None}):
        data = DatasetDict({split: rows for split, rows in data.items() if split != "test"})
    for split, rows in data.items():
        missing = [name for name in used if name not in rows.column_names]
        rule = f"the {split} split must have the columns of the training split"
        _require(not missing, rule, f"none named {', '.join(missing)}", "Add them, or remove the split.")
        data[split] = rows.select_columns(list(used)).rename_columns(used)
    feature, numbers = _classes(data["train"])
    shown = listed([feature.names[number] for number in numbers.values()])
    remedy = "Is this the column of labels?"
    _require(len(numbers) >= 2, "the training split must have two classes or more", shown, remedy)
    for split, rows in data.items():
        labels = list(rows["labels"])
        wrong = next((i for i, value in enumerate(labels) if value not in numbers), None)
        if wrong is not None:
            value, kind = labels[wrong], rows.features["labels"]
            named = isinstance(kind, ClassLabel) and value in range(kind.num_classes)
            received = f"{kind.int2str(value) if named else repr(value)} in {rows['source_row'][wrong]}"
            rule = f"labels of the {split} split must be classes of the training split, {shown}"
            _require(False, rule, received, "Mend or remove the row.")
        if rows.features["labels"] != feature:
            coded = rows.remove_columns("labels").add_column("labels", [numbers[value] for value in labels])
            data[split] = coded.cast_column("labels", feature)
    return data


def _classes(train: Dataset) -> tuple[ClassLabel, dict[Any, int]]:
    """All classes, and {label: its number} of those that the training split has."""
    feature, present = train.features["labels"], set(train["labels"])
    if isinstance(feature, ClassLabel):
        return feature, {label: label for label in sorted(present & set(range(feature.num_classes)))}
    values = sorted(present - {None})
    broken = next((value for value in values if isinstance(value, float) and value != int(value)), None)
    rule, remedy = "labels must be classes, not numbers with a fraction", "Classify; nothing is regressed here."
    _require(broken is None, rule, broken, remedy)
    return ClassLabel(names=[str(value) for value in values]), {value: i for i, value in enumerate(values)}


def _require(valid: bool, rule: str, received: object, remedy: str) -> None:
    require(valid, rule, received=received, remedy=remedy, error=EvaluationError)
