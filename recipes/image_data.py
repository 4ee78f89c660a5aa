"""Images and labels of `image_classification.py`: read, checked, split, and made into what a model takes."""

import io
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from command_line import require
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as Picture
from PIL import ImageOps

from hf_condlr.attacks import Attack, make_attacks

logger = logging.getLogger("image_classification")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # PIL's modes of 8 bits a channel or less


@dataclass
class DataArguments:
    """The images, and the attacks that the test split meets."""

    dataset_name: str = field(metadata={"help": "Name on the Hub, folder of images or parquet, or a parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set of several."})
    image_column: str | None = field(default=None, metadata={"help": "The only column of images if not given."})
    label_column: str | None = field(default=None, metadata={"help": "The only column of class labels if not given."})
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Held out of the training split where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many, for a try."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    crop_padding: int = field(default=0, metadata={"help": "Shift training images by up to so many pixels."})
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
        default=None, metadata={"help": "Attack so many test images, always the same ones; all if not given."}
    )
    attack_checks: bool = field(default=True, metadata={"help": "Look for signs that the attacks failed."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_attack_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be ≥ 1", value)
        require(0 < self.validation_fraction < 1, "validation_fraction must lie in (0, 1)", self.validation_fraction)
        require(self.crop_padding >= 0, "crop_padding must be ≥ 0", self.crop_padding)
        self.make_attacks()

    def make_attacks(self) -> list[Attack]:
        """Each with every budget."""
        return make_attacks(self.attacks, self.epsilons, steps=self.attack_steps) if self.epsilons else []


def load_data(args: DataArguments) -> DatasetDict:
    """The splits train, validation and, where the data have one, test.

    Columns: `image` as stored (the transform decodes it), `labels`, and `row`, the number in the split as read.

    Raises:
        ValueError: A split or column is missing or empty, or labels do not make at least two known classes.
    """
    data = _read(args.dataset_name, args.dataset_config_name)
    require("train" in data, "the data must have a split named train", list(data), "Name its files or folder train.")
    data = _with_columns(data, args)
    if "test" in data and set(data["test"]["labels"]) <= {-1, None}:
        del data["test"]  # a test split whose labels are kept secret
    data = _with_classes(data)
    if "validation" not in data:
        data = _hold_out(data, args.validation_fraction)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None and split in data and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))  # files often come sorted by class
    return data


def _read(name: str, config: str | None) -> DatasetDict:
    try:
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=name)
        return load_dataset(name, config)
    except (ValueError, OSError, DatasetsError) as error:
        rule = f"{name} must be a data set that load_dataset reads, and none of its splits may be empty"
        raise ValueError(
            f"{rule}; received {type(error).__name__}: {error}. Name another, or mend its files."
        ) from error


def _with_columns(data: DatasetDict, args: DataArguments) -> DatasetDict:
    """Only the splits and columns that are used, under one name each."""
    data = DatasetDict({name: data[name] for name in ("train", "validation", "test") if name in data})
    columns = data["train"].features
    image = _column(args.image_column, "image_column", columns, Image)
    label = _column(args.label_column, "label_column", columns, ClassLabel)
    data = data.select_columns([image, label]).rename_columns({image: "image", label: "labels"})
    for name, rows in data.items():
        data[name] = rows.cast_column("image", Image(decode=False)).add_column("row", list(range(len(rows))))
    return data


def _column(given: str | None, option: str, columns: dict[str, Any], kind: type) -> str:
    if given is not None:
        require(given in columns, f"{option} must be one of {', '.join(columns)}", given)
        return given
    found = [name for name, feature in columns.items() if isinstance(feature, kind)]
    rule = f"the data must have one column of {kind.__name__}, or --{option} must name it"
    require(len(found) == 1, rule, found, f"The columns are {', '.join(columns)}.")
    return found[0]


def _with_classes(data: DatasetDict) -> DatasetDict:
    """Labels as numbers of the training split's classes, in every split the same."""
    kind = data["train"].features["labels"]
    if isinstance(kind, ClassLabel):
        number = {label: label for label in range(kind.num_classes)}
    else:
        values = sorted(set(data["train"]["labels"]) - {None})
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
    """A validation split of the training images: the same whatever the training's seed, so that rates compare."""
    names, counts = data["train"].features["labels"].names, Counter(data["train"]["labels"])
    rare = [names[label] for label, count in counts.items() if count == 1]
    require(not rare, "a class needs two images or more for a validation split", rare, "Give a validation split.")
    try:
        held_out = data["train"].train_test_split(fraction, seed=0, stratify_by_column="labels")
    except ValueError as error:  # too few images for so many classes
        raise ValueError(f"{error} Change validation_fraction, or give a validation split.") from error
    return DatasetDict(data | {"train": held_out["train"], "validation": held_out["test"]})


def decoded(images: Dataset) -> Dataset:
    """With PIL images, as `evaluate_robustness` takes them."""
    return images.select_columns(["image", "labels"]).cast_column("image", Image())


class Transform:
    """Rows into what the model takes: images decoded, resized and normalised as its processor says.

    Grey images are repeated in each channel of a colour model; colours are weighed to grey for a grey one.

    Args:
        processor: The model's image processor.
        channels: Of the model, 1 or 3.
        split: For messages.

    Raises:
        ValueError: An image cannot be read, has more than 8 bits a channel, or the model neither 1 nor 3 channels.
    """

    def __init__(self, processor: Any, channels: int = 3, split: str = "data") -> None:
        require(channels in (1, 3), "the model must take images of 1 or 3 channels", channels, "Set num_channels.")
        self.processor, self.split = processor, split
        self.mode = "RGB" if channels == 3 else "L"
        self.told = False

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [self.read(*cell) for cell in zip(batch["image"], batch["row"], strict=True)]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]  # (N, c, h, w)
        return {"pixel_values": pixels, "labels": batch["labels"]}

    def read(self, cell: dict[str, Any], row: int) -> Picture.Image:
        """The image in the model's mode, upright."""
        where = f"row {row} of the {self.split} split" + (f" ({cell['path']})" if cell["path"] else "")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Picture.DecompressionBombWarning)
                image = Picture.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
                image.load()
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and others
            message = f"{type(error).__name__}: {error}"
            raise ValueError(f"an image must be readable; received {message} in {where}. Mend or remove it.") from error
        rule = f"images must have one of the modes {', '.join(EIGHT_BITS)}, 8 bits a channel"
        require(image.mode in EIGHT_BITS, rule, image.mode, f"Convert {where}.")
        image = ImageOps.exif_transpose(image)  # as datasets decodes it
        grey = image.mode in ("1", "L", "LA")
        if not self.told and grey != (self.mode == "L"):
            how = "repeated in each channel" if grey else "weighed to grey"
            kinds = ("grey", "colour") if grey else ("colour", "grey")
            logger.warning("%s images for a %s model: they are %s (%s)", *kinds, how, where)
            self.told = True
        return image.convert(self.mode)
