"""Data of the studies: where they lie, and MNIST as 8-bit tensors, split and cut into batches."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_condlr.robustness.attacks import PixelModel


@dataclass
class Split:
    """Images (N, 1, h, w) uint8 and labels (N,)."""

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
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Split:
        """All images and labels on another device: 8-bit images are small."""
        return Split(self.images.to(device), self.labels.to(device))


def data_folder(name: str, data_dir: str | None = None) -> str:
    """`data_dir`/`name`, or CONDLR_DATA/`name`; ends the program with one line where there is no such folder."""
    folder = data_dir or os.environ.get("CONDLR_DATA")
    if folder is None or not Path(folder, name).is_dir():
        sys.exit(
            f"No folder {name} in {folder or 'nowhere'}: set CONDLR_DATA, or --data_dir, to the folder that holds it."
        )
    return str(Path(folder, name))


def load_images(data_dir: str | None = None) -> dict[str, Split]:
    """The splits train and test of MNIST, from the parquet files of the Hub's `ylecun/mnist` in `data_folder`."""
    source = data_folder("mnist", data_dir)
    try:
        rows = datasets.load_dataset(source)
        return {split: _read(rows[split]) for split in ("train", "test")}
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{source} must hold the splits train and test of MNIST, with the columns image and label: {error!r}")


def _read(rows: datasets.Dataset) -> Split:
    """All images and labels of a split, in memory."""
    # Decoding the bytes ourselves is faster.
    rows = rows.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
    pictures = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L")) for cell in rows["image"]]
    return Split(torch.from_numpy(np.stack(pictures)).unsqueeze(1), torch.tensor(list(rows["label"])))


def pixel_model(model: nn.Module) -> PixelModel:
    """The model behind the normalisation of MNIST's training pixels in [0, 1], which is part of what is attacked."""
    return PixelModel(model, mean=0.1307, std=0.3081)


def hold_out(train: Split, validation_images: int, subset: int | None = None) -> tuple[Split, Split]:
    """Training and validation images, of `subset` images or all; the same for every seed, method and learning rate."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:subset]
    return train.take(order[validation_images:]), train.take(order[:validation_images])
