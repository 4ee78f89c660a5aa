"""Labels of a data set as the model's class numbers, matched by their names where both have names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets import ClassLabel, DatasetDict, List, Value

from hf_condlr.errors import listed
from hf_condlr.robustness.evaluation.rows import class_names, match_classes
from hf_condlr.scripts.checks import check_data
from hf_condlr.scripts.dataset_columns import with_labels


def match_labels(config: Any, data: DatasetDict) -> DatasetDict:
    """Give `labels`, class labels of the data in every split, the numbers and names of the model.

    Raises:
        EvaluationError: The data have more classes than the model, or some of the names agree and not all.
    """
    theirs, ours = class_names(config), data["train"].features["labels"].names
    numbers = _numbers(config, theirs, ours)
    for split, rows in data.items():
        data[split] = with_labels(rows, [numbers[label] for label in rows["labels"]], ClassLabel(names=theirs))
    return data


def match_token_labels(config: Any, data: DatasetDict) -> DatasetDict:
    """The same for lists of labels, one a word; -100 stays.

    Raises:
        EvaluationError: As in `match_labels`; or a row has not one class number a word.
    """
    theirs, kind = class_names(config), getattr(data["train"].features["labels"], "feature", None)
    named = isinstance(kind, ClassLabel)
    used = {split: {label for labels in rows["labels"] for label in labels or ()} for split, rows in data.items()}
    for split, labels in used.items():
        rule, remedy = f"labels of the {split} split must be class numbers", "Is this the column of labels?"
        valid = all(type(label) is int and (label >= 0 or label == -100) for label in labels)
        check_data(valid, rule, listed(sorted(map(repr, labels))), remedy)
    numbered = [str(i) for i in range(1 + max(max(labels, default=0) for labels in used.values()))]
    numbers = _numbers(config, theirs, kind.names if isinstance(kind, ClassLabel) else numbered, named=named)
    for split, rows in data.items():
        pairs = zip(rows["words"], rows["labels"], rows["source_row"], strict=True)
        wrong = [row for words, labels, row in pairs if len(words or ()) != len(labels or ())]
        check_data(not wrong, "rows must have one label a word", listed(wrong), "Repair or remove them.")
        matched = [[-100 if label == -100 else numbers[label] for label in labels] for labels in rows["labels"]]
        data[split] = rows.remove_columns("labels").add_column("labels", matched, feature=List(Value("int64")))
    return data


def _numbers(config: Any, theirs: list[str], ours: list[str], *, named: bool = True) -> list[int]:
    """The model's number for each class of the data."""
    rule = f"the data must have classes of the model, of which there are {len(theirs)}"
    remedy = "Is the model trained on these data, and is this the column of labels?"
    check_data(len(ours) <= len(theirs), rule, f"{len(ours)}: {listed(ours)}", remedy)
    if not named:
        return list(range(len(ours)))
    if (values := _as_numbers(ours)) and not {*ours} & {*theirs}:  # a column of numbers, not of names
        wrong = [value for value in values if not 0 <= value < len(theirs)]
        rule = f"labels that are numbers must be class numbers of the model, 0 to {len(theirs) - 1}"
        check_data(not wrong, rule, listed(list(map(str, wrong))), remedy)
        return values
    matched = match_classes(SimpleNamespace(config=config), SimpleNamespace(classes=ours), None)
    return list(range(len(ours))) if matched is None else matched


def _as_numbers(names: list[str]) -> list[int] | None:
    """Names such as "7" or "7.0", which `labelled` gives to a column of numbers, as integers; None for others."""
    try:
        return [int(float(name)) for name in names]
    except ValueError:
        return None
