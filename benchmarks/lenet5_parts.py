"""Training and test of `lenet5_mnist.py`; what is varied and how results are kept is there.

Network, images and the epoch are those of the recipe of the published experiments, `recipes/paper`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes" / "paper"))
from experiments import EXPERIMENTS
from images import Split, hold_out, load
from methods import condition_numbers
from networks import LeNet5
from training import accuracy, one_epoch

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model, is_factored
from hf_condlr.robustness.attacks import PGD, PixelModel

logger = logging.getLogger("lenet5_mnist")

MEAN, STD = EXPERIMENTS["lenet5_mnist"].mean[0], EXPERIMENTS["lenet5_mnist"].std[0]
LAST_LAYER = {"paper": "fc2", "classic": "fc3"}


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from method, learning rate and seed."""

    architecture: str = field(
        default="paper", metadata={"help": "LeNet5 of which kind.", "choices": ["paper", "classic"]}
    )
    init_weights: str = field(
        default="orthogonal",
        metadata={"help": "Start of all factored models; `svd` for the truncated SVD of the fresh dense weights."},
    )
    rank_ratio: float = field(default=0.2, metadata={"help": "Of every layer but the last, which keeps its full rank."})
    epochs: int = field(default=4, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=128, metadata={"help": "Images of one step."})
    momentum: float = field(default=0.3, metadata={"help": "Of SGD."})
    validation_images: int = field(default=5000, metadata={"help": "Training images held out for the choice."})


@dataclass(frozen=True)
class TestOptions:
    """What a test depends on, apart from the model."""

    epsilon: float = field(default=0.1, metadata={"help": "Radius of the attack, in pixels of [0, 1]."})
    attack_steps: int = field(default=10, metadata={"help": "Steps of PGD, each of 2.5 epsilon/steps."})
    attack_restarts: int = field(default=1, metadata={"help": "Random starts of PGD, the worst counts."})
    attack_loss: str = field(default="ce", metadata={"help": "Loss of PGD.", "choices": ["ce", "margin"]})
    test_images: int = field(default=10000, metadata={"help": "The first so many test images."})


def load_mnist(validation_images: int) -> dict[str, Split]:
    """Train, validation and test; the validation images are the same for every seed, method and learning rate."""
    data_dir = os.environ.get("CONDLR_DATA", str(Path(__file__).resolve().parents[1] / "../shared/data"))
    splits = load("mnist", data_dir)
    splits["train"], splits["validation"] = hold_out(splits["train"], validation_images)
    return splits


def build_model(method: str, seed: int, options: TrainingOptions) -> LeNet5:
    """A fresh model: for one seed the same dense start, and the same factors for all factored methods."""
    torch.manual_seed(seed)
    model = LeNet5(options.architecture)
    if method == "dense":
        return model
    last = LAST_LAYER[options.architecture]
    config = CondLRConfig(
        target_modules=[name for name, _ in model.named_children()],
        rank_ratio=options.rank_ratio,
        rank_pattern={last: 1.0},  # the last layer keeps its rank and is conditioned like the others
        tau=tolerance(method),
        init_weights=options.init_weights,
    )
    return get_robust_lowrank_model(model, config)


def tolerance(method: str) -> float:
    """τ of a factored method; inf where nothing is conditioned."""
    if method == "unconstrained":
        return math.inf
    name, _, value = method.partition("=")
    if name != "tau":
        sys.exit(f"Unknown method {method!r}: dense, unconstrained or tau=NUMBER.")
    return float(value)


def train(
    method: str, learning_rate: float, seed: int, data: dict[str, Split], options: TrainingOptions
) -> tuple[dict[str, Any], LeNet5]:
    """Train one model; returns what happened, and the model. A loss that is not finite ends the training."""
    model = build_model(method, seed, options)
    # Normalisation is part of the attacked model, so it is trained through the same wrapper.
    pixel_model = PixelModel(model, mean=MEAN, std=STD)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=options.momentum)
    if method not in ("dense", "unconstrained"):
        attach_manifold_step(optimizer, model)
    order = torch.Generator().manual_seed(seed)  # of its own: each method sees the images in the same order
    start, losses = time.perf_counter(), []
    for epoch in range(options.epochs):
        losses.append(one_epoch(pixel_model, optimizer, data["train"], order, options.batch_size))
        logger.info("  %s lr=%g seed=%d epoch %d: loss %s", method, learning_rate, seed, epoch + 1, losses[-1])
        if losses[-1] is None:
            break
    return summary(pixel_model, losses, time.perf_counter() - start, data["validation"]), model


def summary(pixel_model: PixelModel, losses: list[float | None], seconds: float, validation: Split) -> dict[str, Any]:
    """What is recorded of a training; a loss of None is one that was not finite."""
    model: Any = pixel_model.model
    row = {
        "training_loss": losses,
        "diverged": losses[-1] is None,
        "training_seconds": round(seconds, 1),
        "validation_accuracy": accuracy(pixel_model, validation),
        "condition_numbers": condition_numbers(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if is_factored(model):
        error = condition_report(model).max_orthonormality_error
        row["orthonormality_error"] = error if math.isfinite(error) else None  # of factors that trained freely
    return row


def test(model: LeNet5, split: Split, options: TestOptions) -> dict[str, float]:
    """Clean accuracy, and accuracy under PGD in the ℓ∞ ball, on the same images."""
    model.requires_grad_(False)
    pixel_model = PixelModel(model, mean=MEAN, std=STD)
    attack = PGD(
        epsilon=options.epsilon,
        norm="linf",
        steps=options.attack_steps,
        restarts=options.attack_restarts,
        loss=options.attack_loss,
    )
    split, start = split.take(torch.arange(min(options.test_images, len(split.labels)))), time.perf_counter()
    correct = 0
    for index in torch.arange(len(split.labels)).split(250):
        pixels, labels = split.batch(index)
        adversarial = attack(pixel_model, pixels, labels)
        # The threat model is checked on what is evaluated, not taken from what the attack promises.
        outside = adversarial.min() < 0 or adversarial.max() > 1
        if outside or (adversarial - pixels).abs().max() > options.epsilon + 1e-6:
            raise RuntimeError("an adversarial image left the ball or the pixel range")
        correct += (pixel_model(adversarial).argmax(-1) == labels).sum().item()
    robust = correct / len(split.labels)
    return {
        "clean_accuracy": accuracy(pixel_model, split),
        "robust_accuracy": robust,
        "test_seconds": round(time.perf_counter() - start, 1),
    }
