"""What `projection_interval` does to the trained model: accuracy, clean and attacked, and how far W jumps.

An MLP 64-128-128-128-10 on scikit-learn's 8×8 digits, every layer but the last at `rank_ratio` with κ ≤ 1 + τ, AdamW.
Every interval trains at every learning rate with the first seed; accuracy on validation images chooses; the other seeds
train at the choice, and the test images are used after that. Jump: ‖W' − W‖_F / ‖W‖_F, the mean over layers and
projections, where W' is what the projection makes of W.

    python -m benchmarks.projection_interval
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.timing import CommonOptions, run
from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from hf_condlr.layers import factored_layers
from hf_condlr.options import option
from hf_condlr.robustness.attacks import PGD, PixelModel
from hf_condlr.tables import markdown_table
from studies.record import mean_and_spread
from studies.report import groups, sweep_table
from studies.rows import sweep

RANK_RATIO, TAU = 0.25, 0.1


@dataclass
class Options(CommonOptions):
    """What is varied."""

    intervals: list[int] = option([1, 2, 4, 8, 16], "projection_interval.")
    learning_rates: list[float] = option([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "Tried by every interval.")
    seeds: list[int] = option([0, 1, 2, 3, 4], "The first one sweeps.")
    epochs: int = option(60, "Passes over 808 images, in batches of 64.")


def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Train, validation and test (45, 15, 40 %): pixels (N, 1, 8, 8) in [0, 1], labels (N,)."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    X, y = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    return {name: (X[i], y[i]) for name, i in {"train": train, "validation": validation, "test": test}.items()}


def build(seed: int) -> nn.Module:
    """The network, converted, normalisation included."""
    torch.manual_seed(seed)
    widths = (64, 128, 128, 128)
    hidden = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))
    config = CondLRConfig(target_modules=["1", "3", "5"], rank_ratio=RANK_RATIO, tau=TAU)
    return PixelModel(get_robust_lowrank_model(model, config), mean=0.3, std=0.35)


def train(interval: int, learning_rate: float, seed: int, data: Any, epochs: int) -> tuple[nn.Module, float]:
    """A model on which the constraint holds, and the mean jump."""
    model = build(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=interval)
    layers, order = factored_layers(model).values(), torch.Generator().manual_seed(seed)
    X, y = data["train"]
    jumps, step = [], 0
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=order).split(64):
            F.cross_entropy(model(X[index]), y[index]).backward()
            step += 1
            # The same as the step does by itself, taken apart to see W before and after.
            handle.projection_interval = step + 1
            optimizer.step()
            optimizer.zero_grad()
            if step % interval == 0:
                before = [layer.to_dense().weight for layer in layers]
                handle.settle()
                after = [layer.to_dense().weight for layer in layers]
                jumps += [((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True)]
    handle.settle()
    return model, statistics.mean(jumps)


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """Share of the images classified correctly."""
    return (model(split[0]).argmax(-1) == split[1]).float().mean().item()


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Sweep with the first seed, then all seeds at the choice."""
    data, attack, models = load(), PGD(epsilon=0.1, norm="linf", steps=20), {}

    def trained(interval: int, rate: float, seed: int) -> dict[str, Any]:
        model, jump = models[interval, rate, seed] = train(interval, rate, seed, data, options.epochs)
        facts = {"label": str(interval), "learning_rate": rate, "diverged": False, "jump": jump}
        return facts | {"validation_accuracy": accuracy(model, data["validation"])}

    def tested(*job: Any) -> dict[str, Any]:
        model = models[job][0].requires_grad_(False)
        X, y = data["test"]
        kappa = condition_report(model.model).max_condition_number
        return {"clean": accuracy(model, (X, y)), "robust": accuracy(model, (attack(model, X, y), y)), "kappa": kappa}

    yield sweep(options.intervals, options.learning_rates, options.seeds, train=trained, test=tested)


def table(results: dict[str, Any]) -> str:
    """A line for each interval, then its sweep."""
    lines = []
    for group in groups(results["rows"]):
        clean, robust = (mean_and_spread([row[kind] for row in group]) for kind in ("clean", "robust"))
        jump, kappa = statistics.mean(row["jump"] for row in group), max(row["kappa"] for row in group)
        facts = [group[0]["label"], f"{group[0]['learning_rate']:g}"]
        lines.append([*facts, clean, robust, f"{jump:.1e}", f"{kappa:.4f}"])
    header = ["projection_interval", "learning rate", "clean %", "PGD 0.1 %", "jump", "largest κ"]
    return f"{markdown_table(header, lines)}\n\n{sweep_table(results['sweep'])}"


if __name__ == "__main__":
    run(Options, measure, table)
