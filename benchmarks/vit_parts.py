"""Data, network and training of `vit_small.py`; what is varied and how results are kept is there."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lenet5_parts import MEAN, STD, Split, accuracy, condition_numbers, load_mnist, one_epoch, tolerance
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from hf_condlr.attacks import PixelModel

logger = logging.getLogger("vit_small")


@dataclass(frozen=True)
class DataSet:
    """What differs between the data sets: normalisation of pixels in [0, 1], the network's shape, augmentation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: dict[str, int]
    augmented: bool


DATA_SETS = {
    "mnist": DataSet(
        (MEAN,), (STD,), {"image_size": 28, "patch_size": 7, "num_channels": 1, "hidden_size": 96}, augmented=False
    ),
    "cifar10": DataSet(
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        {"image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_size": 128},
        augmented=True,
    ),
}


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from data set, method, learning rate and seed."""

    rank_ratio: float | None = field(default=0.25, metadata={"help": "Of every linear layer but the classifier."})
    compression_ratio: float | None = field(
        default=None, metadata={"help": "Set by compression_ratios, which rank_ratio then gives way to."}
    )
    conditioning_warmup: float = field(default=0.3, metadata={"help": "Share of the training until τ is reached."})
    validation_images: int = field(default=5000, metadata={"help": "Training images held out for the choice."})
    train_images: int | None = field(default=None, metadata={"help": "Train on so many of the others; on all if not."})
    epochs: int = field(default=3, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=64, metadata={"help": "Images of one step."})


@dataclass
class Augmented(Split):
    """Mirrors half of the images, and shifts each by up to `padding` pixels into black ones."""

    generator: torch.Generator
    padding: int = 4

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], and labels."""
        pixels, labels = super().batch(index)  # (B, c, h, w)
        mirrored = torch.rand(len(index), 1, 1, 1, generator=self.generator) < 0.5
        padded = pad(torch.where(mirrored, pixels.flip(-1), pixels), [self.padding] * 4)
        height, width = pixels.shape[-2:]
        corners = torch.randint(0, 2 * self.padding + 1, (len(index), 2), generator=self.generator)
        rows = corners[:, :1] + torch.arange(height)  # (B, h)
        columns = corners[:, 1:] + torch.arange(width)  # (B, w)
        batch = torch.arange(len(index))[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), labels


def load_cifar10(validation_images: int) -> dict[str, Split]:
    """Train, validation and test; the validation images are the same for every seed, method and learning rate."""
    folder = Path(os.environ.get("CONDLR_DATA", Path(__file__).resolve().parents[1] / "../shared/data")) / "cifar10"
    if not folder.is_dir():
        sys.exit(f"CIFAR-10 is not at {folder}: set CONDLR_DATA to the folder that holds cifar10/ (parquet files).")
    splits = {}
    for name, rows in datasets.load_dataset(str(folder)).items():
        rows = rows.cast_column("image", datasets.Image(decode=False))  # decoding the bytes ourselves is faster
        images = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in rows["image"]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        splits[name] = Split(pixels, torch.tensor(list(rows["label"])))
    order = torch.randperm(len(splits["train"].labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:validation_images], order[validation_images:]
    return splits | {"train": splits["train"].take(rest), "validation": splits["train"].take(held_out)}


def load(data_set: str, options: TrainingOptions) -> dict[str, Split]:
    """The splits, with as many training images as asked for."""
    splits = (load_mnist if data_set == "mnist" else load_cifar10)(options.validation_images)
    if options.train_images is not None:
        splits["train"] = splits["train"].take(torch.arange(options.train_images))
    return splits


def build_model(method: str, seed: int, options: TrainingOptions, data_set: str = "mnist") -> ViTForImageClassification:
    """A fresh model: for one seed the same weights for dense, and their truncation for all factored methods."""
    torch.manual_seed(seed)
    shape = DATA_SETS[data_set].shape
    config = ViTConfig(
        **shape,
        num_labels=10,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * shape["hidden_size"],
    )
    model = ViTForImageClassification(config)
    if method == "dense":
        return model
    factors = CondLRConfig(
        target_modules="all-linear",
        rank_ratio=options.rank_ratio,
        compression_ratio=options.compression_ratio,
        tau=tolerance(method),
    )
    return get_robust_lowrank_model(model, factors)


def pixel_model(model: ViTForImageClassification, data_set: str) -> PixelModel:
    """Normalisation as a part of the attacked model."""
    return PixelModel(model, mean=DATA_SETS[data_set].mean, std=DATA_SETS[data_set].std)


def train(
    method: str, learning_rate: float, seed: int, data: dict[str, Split], options: TrainingOptions, data_set: str
) -> tuple[dict[str, Any], ViTForImageClassification]:
    """Train one model; returns what happened, and the model. A loss that is not finite ends the training."""
    model = build_model(method, seed, options, data_set)
    wrapped = pixel_model(model, data_set)
    steps = options.epochs * -(-len(data["train"].labels) // options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    if method not in ("dense", "unconstrained"):
        attach_manifold_step(optimizer, model, warmup_steps=round(options.conditioning_warmup * steps))
    # Generators of their own: each method sees the same images in the same order.
    order, images = torch.Generator().manual_seed(seed), data["train"]
    if DATA_SETS[data_set].augmented:
        images = Augmented(images.images, images.labels, torch.Generator().manual_seed(seed))
    start, losses = time.perf_counter(), []
    model.train()
    for epoch in range(options.epochs):
        losses.append(one_epoch(wrapped, optimizer, images, order, options.batch_size, schedule))
        logger.info("  %s lr=%g seed=%d epoch %d: loss %s", method, learning_rate, seed, epoch + 1, losses[-1])
        if losses[-1] is None:
            break
    model.eval()
    row = {
        "training_loss": losses,
        "diverged": losses[-1] is None,
        "training_seconds": round(time.perf_counter() - start, 1),
        "validation_accuracy": accuracy(wrapped, data["validation"]),
        "condition_numbers": condition_numbers(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if hasattr(model, "condlr_config"):
        row["orthonormality_error"] = condition_report(model).max_orthonormality_error
    return row, model
