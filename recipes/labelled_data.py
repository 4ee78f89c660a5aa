"""Splits whose rows have a class each, and the attacks that the test split meets: of images and of texts alike."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from command_line import require
from data_splits import DataArguments, column
from datasets import ClassLabel, DatasetDict

from hf_condlr.robustness.attacks import Attack, make_attacks


@dataclass
class LabelledDataArguments(DataArguments):
    """The data, and the attacks."""

    attacked: ClassVar[tuple[str, ...]] = ("pixels",)
    """What attacks may change, see `Attack.takes`."""

    label_column: str | None = field(default=None, metadata={"help": "The only column of class labels if not given."})
    attacks: list[str] = field(
        default_factory=lambda: ["pgd-linf"],
        metadata={"help": "Attacks on the test split, as hf_condlr.attacks.ATTACKS names them: fgsm, pgd-l2, ..."},
    )
    epsilons: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Budgets of each attack, numbers or fractions (8/255), for pixels in [0, 1]; none: no attack."
        },
    )
    attack_steps: int | None = field(default=None, metadata={"help": "Gradient steps, of the attacks that have them."})
    max_attack_samples: int | None = field(
        default=None, metadata={"help": "Attack so many test samples, always the same ones; all if not given."}
    )
    attack_checks: bool = field(default=True, metadata={"help": "Look for signs that the attacks failed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.max_attack_samples
        require(most is None or most >= 1, "max_attack_samples must be ≥ 1", most)
        others = [attack.name for attack in self.make_attacks() if attack.takes not in self.attacked]
        require(not others, f"these data have attacks on {' or '.join(self.attacked)}", others, "Choose others.")

    def make_attacks(self) -> list[Attack]:
        """Each with every budget."""
        return make_attacks(self.attacks, self.epsilons, steps=self.attack_steps) if self.epsilons else []


def labelled(data: DatasetDict, args: LabelledDataArguments, inputs: dict[str, str], names: tuple = ()) -> DatasetDict:
    """Only the columns that are used, under names of their own, with labels as numbers and a validation split.

    Args:
        data: Splits as read.
        args: The label column and the validation fraction.
        inputs: {column: the name that it gets}.
        names: Of columns that are taken for labels where none is declared to be one.

    Returns:
        Columns: those of `inputs`, `labels`, and `row`, the number in the split as read.

    Raises:
        ValueError: No column of labels, or labels that do not make at least two known classes.
    """
    columns = data["train"].features
    declared = [name for name, kind in columns.items() if isinstance(kind, ClassLabel)]
    found = declared or [name for name in names if name in columns][:1]
    label = column(args.label_column, "label_column", columns, found, "ClassLabel")
    used = {**inputs, label: "labels"}
    if "test" in data and label not in data["test"].column_names:
        del data["test"]  # its labels are kept secret
    for split, rows in data.items():
        missing = [name for name in used if name not in rows.column_names]
        require(not missing, f"the {split} split must have the columns {', '.join(used)}", rows.column_names)
        rows = rows.select_columns(list(used)).rename_columns(used)
        data[split] = rows.add_column("row", list(range(len(rows))))
    if "test" in data and set(data["test"]["labels"]) <= {-1, None}:
        del data["test"]  # so are these
    data = _with_classes(data)
    return data if "validation" in data else _hold_out(data, args.validation_fraction)


def _with_classes(data: DatasetDict) -> DatasetDict:
    """Labels as numbers of the training split's classes, in every split the same."""
    kind = data["train"].features["labels"]
    if isinstance(kind, ClassLabel):
        number: dict[Any, int] = {label: label for label in range(kind.num_classes)}
    else:
        values = sorted(set(data["train"]["labels"]) - {None})
        broken = next((v for v in values if isinstance(v, float) and v != int(v)), None)
        rule = "labels must be classes, not numbers with a fraction"
        require(broken is None, rule, broken, "The recipe classifies; it does not regress.")
        kind, number = ClassLabel(names=[str(value) for value in values]), {v: i for i, v in enumerate(values)}
    for name, rows in data.items():
        labels = list(rows["labels"])
        wrong = next((i for i, label in enumerate(labels) if label not in number), None)
        if wrong is not None:
            rule = f"labels of the {name} split must be classes of the training split, {_some(kind.names)}"
            require(False, rule, labels[wrong], f"It stands in row {wrong}: mend or remove it.")
        if rows.features["labels"] != kind:
            numbers = rows.remove_columns("labels").add_column("labels", [number[label] for label in labels])
            data[name] = numbers.cast_column("labels", kind)
    present = sorted({kind.names[label] for label in set(data["train"]["labels"])})
    require(
        len(present) >= 2, "the training split must hold at least two classes", present, "Is this the label column?"
    )
    return data


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _hold_out(data: DatasetDict, fraction: float) -> DatasetDict:
    """A validation split of the training samples: the same whatever the training's seed, so that rates compare."""
    names, counts = data["train"].features["labels"].names, Counter(data["train"]["labels"])
    rare = [names[label] for label, count in counts.items() if count == 1]
    require(not rare, "a class needs two samples or more for a validation split", rare, "Give a validation split.")
    try:
        held_out = data["train"].train_test_split(fraction, seed=0, stratify_by_column="labels")
    except ValueError as error:  # too few samples for so many classes
        raise ValueError(f"{error} Change validation_fraction, or give a validation split.") from error
    return DatasetDict(data | {"train": held_out["train"], "validation": held_out["test"]})


def card_name(dataset_name: str | None) -> str | None:
    """What a model card calls the data: their name on the Hub, if they are there."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name
