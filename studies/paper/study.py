"""The rows of a table: trainings as in the published experiments, and tests of the trained models."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.optim.lr_scheduler import MultiStepLR

from hf_condlr.options import option
from hf_condlr.robustness.attacks import PGD
from studies.data import Split, hold_out, load_images, pixel_model
from studies.paper.methods import Method, build_model, make_optimizer, prune
from studies.paper.training import accuracy, fit, measure
from studies.record import any_device
from studies.rows import Rows, attacked

MILESTONES = (70 / 120, 100 / 120)  # of the training; as published
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from method, rank, learning rate and seed."""

    epochs: int = option(120, "Passes over the training images; 120 as published.")
    batch_size: int = option(128, "Images of one step.")
    gamma: float = option(0.3, "Factor of the learning rate after 58 and 83 % of the steps; 1: constant rate.")
    subset: int | None = option(None, "Number of training images, validation included; all if not given.")
    validation_fraction: float = option(0.25, "Share of the training images held out for the choice of the rate.")
    ranks: list[str] = option([], "Layers with a rank ratio of their own, such as conv2=0.5.")
    adversarial: float = option(
        0.0,
        "Train on images that three steps of PGD attacked with this ε, and choose the rate by the mean of clean and "
        "robust accuracy; 0: on the images as they are.",
    )

    def __post_init__(self) -> None:
        ratios_of(self.ranks)

    @property
    def attack(self) -> PGD | None:
        """What finds the training images, ℓ∞."""
        return PGD(self.adversarial, steps=3, early_stop=False) if self.adversarial else None


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method, at a rank where it has one."""

    method: str
    rank_ratio: float | None

    @property
    def label(self) -> str:
        """The line's first cell."""
        ratio = "" if self.rank_ratio is None else f", rank ratio {self.rank_ratio:g}"
        return Method.parse(self.method).label + ratio


class Study:
    """Makes the rows that are missing, and keeps them in the output folder.

    Args:
        options: `studies.paper.table.Options`.
        training: What all rows have in common.
    """

    def __init__(self, options: Any, training: TrainingOptions) -> None:
        self.options, self.training, self.device = options, training, any_device()
        self.rows = Rows(Path(options.output_dir) / "rows")

    @functools.cached_property
    def data(self) -> dict[str, Split]:
        """Read when first needed: a call that only prints needs no images."""
        splits = load_images(self.options.data_dir)
        total = min(len(splits["train"].labels), self.training.subset or len(splits["train"].labels))
        held_out = round(self.training.validation_fraction * total)
        splits["train"], splits["validation"] = hold_out(splits["train"], held_out, total)
        return {name: split.to(self.device) for name, split in splits.items()}

    def train(self, entry: Entry, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; the weights lie in its folder."""
        facts = {**asdict(entry), "learning_rate": learning_rate, "seed": seed}

        def make(folder: Path) -> dict[str, Any]:
            if entry.method == "svd_prune":
                model, result = self._pruned(entry, learning_rate, seed)
            else:
                model, result = self._trained(entry, learning_rate, seed, folder)
            save_model(model, str(folder / WEIGHTS))
            return {"label": entry.label, **facts, **result}

        name = f"{entry.method} {entry.rank_ratio or ''} lr {learning_rate:g} seed {seed}"
        return self.rows.row(name, facts | asdict(self.training), make)

    def _trained(self, entry: Entry, learning_rate: float, seed: int, folder: Path) -> tuple[Any, dict[str, Any]]:
        method, o = Method.parse(entry.method), self.training
        model = build_model(method, seed, entry.rank_ratio, ratios_of(o.ranks)).to(self.device)
        optimizer, handle = make_optimizer(method, model, learning_rate)
        steps = o.epochs * math.ceil(len(self.data["train"].labels) / o.batch_size)
        schedule = MultiStepLR(optimizer, [round(share * steps) for share in MILESTONES], o.gamma)
        result = fit(
            pixel_model(model).to(self.device),
            optimizer,
            schedule,
            handle,
            self.data,
            epochs=o.epochs,
            batch_size=o.batch_size,
            seed=seed,
            folder=folder,
            attack=o.attack,
        )
        return model, result

    def _pruned(self, entry: Entry, learning_rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
        """The dense network of the same rate and seed, truncated, without training after it."""
        row = self.train(Entry("dense", None), learning_rate, seed)
        result = {name: row[name] for name in ("training_loss", "diverged", "training_seconds")}
        model = load_trained(row).to(self.device)
        if not result["diverged"]:
            model = prune(model, entry.rank_ratio, ratios_of(self.training.ranks))
            result |= measure(pixel_model(model).to(self.device), self.data["validation"], self.training.attack)
        return model, result

    def test(self, entry: Entry, learning_rate: float, seed: int) -> dict[str, Any]:
        """Accuracy on the test split, clean and under each attack, on the same images for every row."""
        row = self.train(entry, learning_rate, seed)
        return attacked(
            Path(row["folder"]),
            entry.label,
            self.options.attacks,
            self.options.attacked_images,
            build=lambda: pixel_model(load_trained(row)).to(self.device).eval(),
            data=self.data["test"].first,
            clean=lambda model: accuracy(model, self.data["test"]),
            batch_size=250,
            checks=seed == self.options.seeds[0] and self.options.check_samples > 0,
            check_samples=max(self.options.check_samples, 1),
        )


def ratios_of(ranks: list[str]) -> dict[str, float]:
    """{layer: rank ratio} of words such as `conv2=0.5`."""
    try:
        return {layer: float(ratio) for layer, _, ratio in (word.partition("=") for word in ranks)}
    except ValueError:
        raise ValueError(f"ranks must be words such as conv2=0.5; received {', '.join(ranks)}") from None


def load_trained(row: dict[str, Any]) -> torch.nn.Module:
    """The model of a row, on the CPU, in evaluation mode."""
    method, ranks = Method.parse(row["method"]), ratios_of(row["key"]["ranks"])
    model = build_model(method, row["seed"], row["rank_ratio"], ranks)
    if method.kind == "svd_prune":
        model = prune(model, row["rank_ratio"], ranks)
    load_model(model, str(Path(row["folder"]) / WEIGHTS))
    return model.eval()
