"""Data, network and training of `vit_small.py`; what is varied and how results are kept is there."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lenet5_parts import MEAN, STD, Split, one_epoch, summary, tolerance
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes" / "paper"))
from images import Augmented, hold_out, load

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.robustness.attacks import PixelModel

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


def load_splits(data_set: str, options: TrainingOptions) -> dict[str, Split]:
    """Train, validation and test; the validation images are the same for every seed, method and learning rate."""
    data_dir = os.environ.get("CONDLR_DATA", str(Path(__file__).resolve().parents[1] / "../shared/data"))
    splits = load(data_set, data_dir)
    splits["train"], splits["validation"] = hold_out(splits["train"], options.validation_images)
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
    return summary(wrapped, losses, time.perf_counter() - start, data["validation"]), model
