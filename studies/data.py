"""Data of the studies: where they lie, and images as 8-bit tensors, split and cut into batches."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("fine_label", "label", "labels")
# Mean and standard deviation of the training pixels in [0, 1], for each channel.
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass
class Split:
    """Images (N, c, h, w) uint8 and labels (N,)."""

    images: Tensor
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], and labels."""
        return self.images[index].float() / 255, self.labels[index]

    def first(self, count: int | None = None) -> torch.utils.data.TensorDataset:
        """The first images, or all of them, as pairs on the CPU."""
        cpu = self.to(torch.device("cpu"))
        return torch.utils.data.TensorDataset(*cpu.batch(torch.arange(len(self.labels))[:count]))

    def take(self, index: Tensor) -> Split:
        """The rows of `index`."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> Split:
        """On another device, all of it: 8-bit images are small."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass
class Augmented(Split):
    """A split whose batches are mirrored with probability ½ and shifted by up to 4 pixels, black beyond the border."""

    generator: torch.Generator

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = super().batch(index)
        height, width = pixels.shape[-2:]
        mirrored = torch.rand(len(index), generator=self.generator) < 0.5
        corners = torch.randint(0, 9, (len(index), 2), generator=self.generator).tolist()
        pixels = torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)
        padded = F.pad(pixels, [4] * 4)
        return torch.stack(
            [x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)]
        ), labels


def data_folder(name: str, data_dir: str | None = None) -> str:
    """`data_dir`/`name`, or CONDLR_DATA/`name`; ends the program with one line where there is no such folder."""
    folder = data_dir or os.environ.get("CONDLR_DATA")
    if folder is None or not Path(folder, name).is_dir():
        sys.exit(
            f"No folder {name} in {folder or 'nowhere'}: set CONDLR_DATA, or --data_dir, to the folder that holds it."
        )
    return str(Path(folder, name))


def load_images(name: str, data_dir: str | None = None, dataset_name: str | None = None) -> dict[str, Split]:
    """The splits train and test of a folder of parquet files, see `data_folder`, or of a data set on the Hub."""
    source = dataset_name or data_folder(name, data_dir)
    try:
        rows = datasets.load_dataset(source)
    except (OSError, ValueError) as error:
        sys.exit(f"The data set {source} cannot be read: {str(error).splitlines()[0]}")
    if missing := {"train", "test"} - set(rows):
        sys.exit(f"The data set {source} has no split {' and '.join(sorted(missing))}, but {', '.join(rows)}.")
    return {split: _read(rows[split], source) for split in ("train", "test")}


def _read(rows: datasets.Dataset, source: str) -> Split:
    """All images and labels of a split, in memory."""
    image, label = (
        next((name for name in names if name in rows.column_names), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None or label is None:
        sys.exit(f"The data set {source} must have the columns image and label; it has {', '.join(rows.column_names)}.")
    rows = rows.cast_column(image, datasets.Image(decode=False))  # decoding the bytes ourselves is faster
    pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in rows[image]]
    mode = "L" if pictures[0].mode in ("1", "L") else "RGB"
    images = torch.from_numpy(np.stack([np.asarray(picture.convert(mode)) for picture in pictures]))
    images = images.unsqueeze(1) if mode == "L" else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(list(rows[label])))


def hold_out(train: Split, validation_images: int, subset: int | None = None) -> tuple[Split, Split]:
    """Training and validation images, of `subset` images or all; the same for every seed, method and learning rate."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:subset]
    return train.take(order[validation_images:]), train.take(order[:validation_images])
