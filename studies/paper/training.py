"""Training of image classifiers, saved after each epoch: one that is killed goes on and ends at the same numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from hf_condlr import condition_report
from hf_condlr.files import replacing
from hf_condlr.robustness.attacks import Attack, PixelModel
from studies.data import Split
from studies.paper.methods import condition_numbers
from studies.rows import CHECKPOINT

logger = logging.getLogger("studies")


def fit(
    model: PixelModel,
    optimizer: Optimizer,
    schedule: Any,
    handle: Any,
    data: dict[str, Split],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
    attack: Attack | None = None,
) -> dict[str, Any]:
    """Train, and measure the trained model on validation images.

    Args:
        model: Trained through its normalisation, which is part of what is attacked.
        optimizer: The model's optimizer.
        schedule: Its learning rate, stepped after each optimizer step.
        handle: The manifold step, or None.
        data: Splits train and validation.
        epochs: Passes over the training images.
        batch_size: Images of one step.
        seed: Of the order of the images, which is the same for each method.
        folder: Where the checkpoint is kept.
        attack: Finds the images of each step; None: they are as they are.

    Returns:
        `training_loss`, None for an epoch in which the loss was not finite, which ends the training; `diverged`,
        `training_seconds`, and the results of `measure`.
    """
    order = torch.Generator().manual_seed(seed)
    # The handle comes last: it looks at the weights when its state is loaded.
    stateful = {"model": model.model, "optimizer": optimizer, "schedule": schedule} | (
        {"step": handle} if handle else {}
    )
    losses, seconds = load_checkpoint(folder / CHECKPOINT, stateful, order)
    while len(losses) < epochs and None not in losses:
        start = time.perf_counter()
        model.train()
        losses.append(one_epoch(model, optimizer, data["train"], order, batch_size, schedule, attack))
        seconds += time.perf_counter() - start
        logger.info("  epoch %d of %d: loss %s", len(losses), epochs, losses[-1])
        save_checkpoint(folder / CHECKPOINT, stateful, order, losses, seconds)
    result = {"training_loss": losses, "diverged": None in losses, "training_seconds": round(seconds, 1)}
    if handle:
        result["orthonormality_error"] = condition_report(model.model).max_orthonormality_error
    return result | measure(model, data["validation"], attack)


def measure(model: PixelModel, validation: Split, attack: Attack | None = None) -> dict[str, Any]:
    """Validation accuracy, condition numbers and size of a trained model, which is left in evaluation mode.

    With `attack` the validation accuracy is the mean of the clean one and that under attack.
    """
    model.eval()
    clean = accuracy(model, validation)
    return {
        "validation_accuracy": (clean + accuracy(model, validation, attack)) / 2 if attack else clean,
        "condition_numbers": condition_numbers(model.model),
        "parameters": sum(p.numel() for p in model.model.parameters()),
    }


def one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data: Split,
    order: torch.Generator,
    batch_size: int,
    schedule: Any,
    attack: Attack | None = None,
) -> float | None:
    """Mean loss of one pass over the split; None, at once, when the loss is not finite or a core vanishes."""
    total, batches = 0.0, torch.randperm(len(data.labels), generator=order).split(batch_size)
    for number, index in enumerate(batches):
        pixels, labels = data.batch(index)
        if attack:
            pixels = attack.reseeded(number)(model, pixels, labels)
        loss = F.cross_entropy(model(pixels), labels)
        if not loss.isfinite():
            return None
        optimizer.zero_grad()
        loss.backward()
        try:
            optimizer.step()
        except ArithmeticError:  # hf_condlr's ConditioningError
            return None
        schedule.step()
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, attack: Attack | None = None) -> float:
    """Share of the split classified correctly, perhaps under attack, in the mode in which the model is."""
    correct = 0
    for index in torch.arange(len(split.labels)).split(500):
        pixels, labels = split.batch(index)
        if attack:
            pixels = attack(model, pixels, labels)
        correct += (model(pixels).argmax(-1) == labels).sum().item()
    return correct / len(split.labels)


def save_checkpoint(path: Path, stateful: Mapping, order: torch.Generator, losses: list, seconds: float) -> None:
    """Everything that the rest of the training depends on, in one file that replaces the one before."""
    state = {
        "losses": losses,
        "seconds": seconds,
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
        "order": order.get_state(),
        "random": torch.get_rng_state(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, stateful: Mapping, order: torch.Generator) -> tuple[list[float | None], float]:
    """Losses of the finished epochs and the seconds spent; nothing where there is no checkpoint."""
    if not path.exists():
        return [], 0.0
    state = torch.load(path, weights_only=True)
    for name, part in stateful.items():
        part.load_state_dict(state["stateful"][name])
    order.set_state(state["order"])
    torch.set_rng_state(state["random"])
    return state["losses"], state["seconds"]
