"""Images and labels of `image_classification.py`: read, checked, split, and made into what a model takes."""

import io
import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

from command_line import require
from data_splits import column, limit, read_splits
from datasets import Dataset, DatasetDict, Image
from labelled_data import LabelledDataArguments, labelled
from PIL import Image as Picture
from PIL import ImageOps

logger = logging.getLogger("image_classification")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # PIL's modes of 8 bits a channel or less


@dataclass
class DataArguments(LabelledDataArguments):
    """The images, and the attacks that the test split meets."""

    image_column: str | None = field(default=None, metadata={"help": "The only column of images if not given."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    crop_padding: int = field(default=0, metadata={"help": "Shift training images by up to so many pixels."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.crop_padding >= 0, "crop_padding must be ≥ 0", self.crop_padding)


def load_data(args: DataArguments) -> DatasetDict:
    """The splits train, validation and, where the data have one, test.

    Columns: `image` as stored (the transform decodes it), `labels`, and `row`, the number in the split as read.

    Raises:
        ValueError: A split or column is missing or empty, or labels do not make at least two known classes.
    """
    data = read_splits(args.dataset_name, args.dataset_config_name)
    columns = data["train"].features
    found = [name for name, kind in columns.items() if isinstance(kind, Image)]
    data = labelled(data, args, {column(args.image_column, "image_column", columns, found, "Image"): "image"})
    return limit(data.cast_column("image", Image(decode=False)), args)


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
