"""One training, as in the published experiments: SGD, batches of 128, rate times 0.3 after 70 and 100 of 120 epochs.

With fewer epochs the two places move proportionally, to the step. Whole after each epoch on disk: a training that is
killed goes on from there and ends at the same numbers.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiments import Experiment
from images import Augmented, Split
from methods import Method, build_model, condition_numbers, make_optimizer
from resuming import load_checkpoint, save_checkpoint
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from hf_condlr import condition_report
from hf_condlr.robustness.attacks import PixelModel

logger = logging.getLogger("paper")
MILESTONES, GAMMA = (70 / 120, 100 / 120), 0.3


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from experiment, method, rank, learning rate and seed."""

    epochs: int = field(default=120, metadata={"help": "Passes over the training images; 120 as published."})
    batch_size: int = field(default=128, metadata={"help": "Images of one step."})
    subset: int | None = field(
        default=None, metadata={"help": "Use so many training images, validation included; all if not given."}
    )
    validation_fraction: float = field(
        default=0.25, metadata={"help": "Share of the training images held out for the choice of the learning rate."}
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "subset"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be ≥ 1; received {value}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in (0, 1); received {self.validation_fraction}")


@dataclass(frozen=True)
class Job:
    """One model of the table."""

    method: str
    rank_ratio: float | None
    """None where the method has full rank."""
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        rank = "" if self.rank_ratio is None else f" rank_ratio {self.rank_ratio:g}"
        return f"{self.method}{rank} lr {self.learning_rate:g} seed {self.seed}"


def train(
    job: Job,
    experiment: Experiment,
    options: TrainingOptions,
    data: dict[str, Split],
    folder: Path,
    device: torch.device,
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model and what happened. A loss that is not finite ends the training."""
    method = Method.parse(job.method)
    model = build_model(method, experiment, job.seed, job.rank_ratio).to(device)
    # Normalisation is part of the attacked model, so it is trained through the same wrapper.
    pixel_model = PixelModel(model, mean=experiment.mean, std=experiment.std).to(device)
    optimizer, handle = make_optimizer(method, model, job.learning_rate, experiment.momentum)
    steps = options.epochs * math.ceil(len(data["train"].labels) / options.batch_size)
    schedule = MultiStepLR(optimizer, [round(share * steps) for share in MILESTONES], GAMMA)
    # Generators of their own: each method sees the same images in the same order.
    generators = {name: torch.Generator().manual_seed(job.seed) for name in ("order", "augmentation")}
    images = data["train"]
    if experiment.augment:
        images = Augmented(images.images, images.labels, generators["augmentation"])
    stateful = {"optimizer": optimizer, "schedule": schedule} | ({"manifold": handle} if handle else {})
    losses, seconds = load_checkpoint(folder, model, stateful, generators)
    while len(losses) < options.epochs and None not in losses:
        start = time.perf_counter()
        model.train()
        losses.append(one_epoch(pixel_model, optimizer, images, generators["order"], options.batch_size, schedule))
        seconds += time.perf_counter() - start
        logger.info("  %s epoch %d: loss %s", job, len(losses), losses[-1])
        save_checkpoint(folder, model, stateful, generators, losses, seconds)
    result = {"training_loss": losses, "diverged": None in losses, "training_seconds": round(seconds, 1)}
    if handle:
        result["orthonormality_error"] = condition_report(model).max_orthonormality_error
    return model, result | measure(model, experiment, data["validation"])


def measure(model: nn.Module, experiment: Experiment, validation: Split) -> dict[str, Any]:
    """Validation accuracy, condition numbers and size of a trained model, which is left in evaluation mode."""
    model.eval()
    pixel_model = PixelModel(model, mean=experiment.mean, std=experiment.std).to(validation.labels.device)
    return {
        "validation_accuracy": accuracy(pixel_model, validation),
        "condition_numbers": condition_numbers(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def one_epoch(
    model: nn.Module, optimizer: Optimizer, data: Split, order: torch.Generator, batch_size: int, schedule: Any = None
) -> float | None:
    """Mean loss of one pass over the split; None, at once, when the loss is not finite or a core vanishes."""
    total, batches = 0.0, torch.randperm(len(data.labels), generator=order).split(batch_size)
    for index in batches:
        pixels, labels = data.batch(index)
        loss = F.cross_entropy(model(pixels), labels)
        if not loss.isfinite():
            return None
        optimizer.zero_grad()
        loss.backward()
        try:
            optimizer.step()
        except ArithmeticError:  # hf_condlr's ConditioningError
            return None
        if schedule is not None:
            schedule.step()
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the split classified correctly, in the mode in which the model is."""
    correct = 0
    for index in torch.arange(len(split.labels)).split(500):
        pixels, labels = split.batch(index)
        correct += (model(pixels).argmax(-1) == labels).sum().item()
    return correct / len(split.labels)
