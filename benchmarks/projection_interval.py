"""What `projection_interval` does to the trained model: accuracy, clean and attacked, and how far W jumps.

An MLP 64-128-128-128-10 on scikit-learn's 8×8 digits, every layer but the last at `rank_ratio` with κ ≤ 1 + τ, AdamW.
Every interval trains at every learning rate with the first seed; accuracy on validation images chooses; the other seeds
train at the choice, and the test images are used after that. Jump: ‖W' − W‖_F / ‖W‖_F, the mean over layers and
projections, where W' is what the projection makes of W.

    python benchmarks/projection_interval.py
"""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import markdown, mean_and_spread, write_record
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from hf_condlr.layers import factored_layers
from hf_condlr.robustness.attacks import PGD, PixelModel


@dataclass
class Options:
    """What is varied."""

    intervals: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "projection_interval."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], metadata={"help": "Tried by every interval."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "The first one sweeps."})
    epochs: int = field(default=60, metadata={"help": "Passes over 808 images, in batches of 64."})
    rank_ratio: float = field(default=0.25, metadata={"help": "Of all layers but the last."})
    tau: float = field(default=0.1, metadata={"help": "Conditioning tolerance."})
    epsilon: float = field(default=0.1, metadata={"help": "ℓ∞ radius of PGD, 20 steps, pixels in [0, 1]."})
    output: str = field(default="outputs/projection_interval.json", metadata={"help": "Where the numbers go."})


def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Train, validation and test (45, 15, 40 %): pixels (N, 1, 8, 8) in [0, 1], labels (N,)."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    X, y = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    return {name: (X[i], y[i]) for name, i in {"train": train, "validation": validation, "test": test}.items()}


def build(seed: int, options: Options) -> nn.Module:
    """The network, converted, normalisation included."""
    torch.manual_seed(seed)
    widths = (64, 128, 128, 128)
    hidden = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))
    config = CondLRConfig(target_modules=["1", "3", "5"], rank_ratio=options.rank_ratio, tau=options.tau)
    return PixelModel(get_robust_lowrank_model(model, config), mean=0.3, std=0.35)


def train(interval: int, learning_rate: float, seed: int, data: Any, options: Options) -> tuple[nn.Module, float]:
    """A model, settled, and the mean jump."""
    model = build(seed, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=interval)
    layers, order = factored_layers(model).values(), torch.Generator().manual_seed(seed)
    X, y = data["train"]
    jumps, step = [], 0
    for _ in range(options.epochs):
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


def measure(interval: int, data: Any, options: Options) -> dict[str, Any]:
    """Sweep with the first seed, then all seeds at the choice."""
    first = options.seeds[0]
    sweep = {
        lr: accuracy(train(interval, lr, first, data, options)[0], data["validation"]) for lr in options.learning_rates
    }
    chosen = max(sweep, key=lambda lr: sweep[lr])
    attack = PGD(epsilon=options.epsilon, norm="linf", steps=20)
    rows = []
    for seed in options.seeds:
        model, jump = train(interval, chosen, seed, data, options)
        model.requires_grad_(False)
        X, y = data["test"]
        robust = accuracy(model, (attack(model, X, y), y))
        kappa = condition_report(model.model).max_condition_number
        rows.append({"clean": accuracy(model, data["test"]), "robust": robust, "jump": jump, "kappa": kappa})
    return {"interval": interval, "sweep": sweep, "learning_rate": chosen, "rows": rows}


def main() -> None:
    """Measure, print the table, write everything."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(1)
    data = load()
    results = [measure(interval, data, options) for interval in options.intervals]
    lines = [
        [
            str(r["interval"]),
            f"{r['learning_rate']:g}",
            mean_and_spread([row["clean"] for row in r["rows"]], 1),
            mean_and_spread([row["robust"] for row in r["rows"]], 1),
            f"{statistics.mean(row['jump'] for row in r['rows']):.1e}",
            f"{max(row['kappa'] for row in r['rows']):.4f}",
        ]
        for r in results
    ]
    header = ["projection_interval", "learning rate", "clean %", f"PGD {options.epsilon:g} %", "jump", "largest κ"]
    sys.stdout.write(markdown(header, lines) + "\n\nvalidation accuracy in %, first seed\n\n")
    sweep = [[str(r["interval"]), *(f"{100 * value:.1f}" for value in r["sweep"].values())] for r in results]
    sys.stdout.write(markdown(["projection_interval", *(f"{lr:g}" for lr in options.learning_rates)], sweep) + "\n")
    sys.stdout.write(f"\nwrote {write_record(Path(options.output), {'results': results}, options)}\n")


if __name__ == "__main__":
    main()
