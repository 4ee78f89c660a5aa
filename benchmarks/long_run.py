"""Fifty thousand optimizer steps: does anything drift? Constraint, memory and the time of a step, and their picture.

The MLP and the digits of `projection_interval.py`, AdamW at a constant learning rate, with fresh noise on the pixels of
each batch, so that gradients never vanish. **Every** step is checked in float64: ‖UᵀU − I‖_F and ‖VᵀV − I‖_F over √r,
and κ(S) over the bound in force, minus 1. Times are processor time of this one thread, which other programs on the
machine hardly touch. Rows are windows of `window` steps: largest errors, median time, resident memory at the end.

    python benchmarks/long_run.py --picture docs/long_run.png
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import projection_interval
import psutil
import torch
import torch.nn.functional as F
from record import markdown, write_record
from torch import Tensor
from transformers import HfArgumentParser

from hf_condlr import attach_manifold_step
from hf_condlr.layers import factored_layers
from hf_condlr.linalg import condition_number, orthonormality_error

MIB = 2**20


@dataclass
class Options:
    """The training."""

    steps: int = field(default=50_000, metadata={"help": "Optimizer steps."})
    window: int = field(default=500, metadata={"help": "Steps that a row of the record sums up."})
    warmup_steps: int = field(default=5_000, metadata={"help": "Of the bound on κ."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of AdamW, constant."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    noise: float = field(default=0.3, metadata={"help": "Standard deviation of the noise on pixels in [0, 1]."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})
    rank_ratio: float = field(default=0.25, metadata={"help": "Of all layers but the last."})
    tau: float = field(default=0.1, metadata={"help": "Conditioning tolerance."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    output: str = field(default="outputs/long_run.json", metadata={"help": "Where the numbers go."})
    picture: str = field(default="", metadata={"help": "Where the picture goes; none without it."})


def batches(split: tuple[Tensor, Tensor], options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: shuffled, with fresh noise."""
    X, y = split
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        for index in torch.randperm(len(y), generator=generator).split(options.batch_size):
            noise = torch.randn(X[index].shape, generator=generator)
            yield (X[index] + options.noise * noise).clamp(0, 1), y[index]


def errors(handle: Any) -> tuple[float, float]:
    """Largest ‖UᵀU − I‖_F / √r and largest κ/bound − 1 of all layers; anything not finite counts as inf."""
    orthonormality, excess = 0.0, -math.inf
    for name, bound in handle.bounds().items():
        layer = handle.layers[name]
        bases = max(orthonormality_error(p.detach()).item() for p in (layer.U, layer.V)) / math.sqrt(layer.r)
        kappa = condition_number(layer.S.detach()).item() / bound - 1
        orthonormality = max(orthonormality, bases if math.isfinite(bases) else math.inf)
        excess = max(excess, kappa if math.isfinite(kappa) else math.inf)
    return orthonormality, excess


def train(options: Options) -> list[dict[str, float]]:
    """A row for each window."""
    data = projection_interval.load()
    model = projection_interval.build(
        options.seed, projection_interval.Options(rank_ratio=options.rank_ratio, tau=options.tau)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    handle = attach_manifold_step(optimizer, model, warmup_steps=options.warmup_steps)
    source, process, rows = batches(data["train"], options), psutil.Process(), []
    found: list[tuple[float, float, float, float]] = []
    for step in range(1, options.steps + 1):
        X, y = next(source)
        start = time.process_time()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.process_time() - start
        found.append((*errors(handle), seconds, loss.item()))
        if step % options.window == 0:
            orthonormality, excess, times, losses = zip(*found, strict=True)
            found = []
            rows.append(
                {
                    "step": step,
                    "orthonormality_error": max(orthonormality),
                    "kappa_excess": max(excess),
                    "bound": max(handle.bounds().values()),
                    "milliseconds": 1e3 * statistics.median(times),
                    "memory_mib": process.memory_info().rss / MIB,
                    "loss": statistics.mean(losses),
                    "validation_accuracy": projection_interval.accuracy(model, data["validation"]),
                }
            )
    assert len(factored_layers(model)) == 3 and handle.step_count == options.steps
    return rows


def draw(rows: list[dict[str, float]], path: str) -> None:
    """Four panels over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = (
        ("orthonormality_error", "largest ‖UᵀU − I‖_F / √r", 1e-5, "guaranteed: 1e-5"),
        ("kappa_excess", "largest κ / bound − 1", 1e-4, "guaranteed: 1e-4"),
        ("memory_mib", "resident memory, MiB", None, ""),
        ("milliseconds", "a training step, ms (median)", None, ""),
    )
    for axes, (key, label, limit, text) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        values = [row[key] for row in rows]
        axes.plot([row["step"] for row in rows], values, color="#2b6cb0")
        if limit is not None:
            axes.axhline(limit, color="#d1802f", linestyle="--", label=text)
            axes.legend(frameon=False, fontsize=8)
            axes.set_yscale("log" if min(values) > 0 else "symlog", **({} if min(values) > 0 else {"linthresh": 1e-7}))
        else:
            axes.set_ylim(0, 1.5 * max(values))
        axes.set(ylabel=label)
        axes.grid(alpha=0.25)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, float]]) -> str:
    """The windows joined to ten rows."""
    size = math.ceil(len(rows) / 10)
    lines = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        lines.append(
            [
                f"{part[-1]['step']:.0f}",
                f"{max(row['orthonormality_error'] for row in part):.1e}",
                f"{max(row['kappa_excess'] for row in part):.1e}",
                f"{part[-1]['memory_mib']:.1f}",
                f"{statistics.median(row['milliseconds'] for row in part):.2f}",
                f"{100 * part[-1]['validation_accuracy']:.1f}",
            ]
        )
    return markdown(
        ["up to step", "‖UᵀU − I‖_F / √r", "κ / bound − 1", "memory, MiB", "a step, ms", "accuracy, %"], lines
    )


def main() -> None:
    """Train, print, write, draw."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(1)
    rows = train(options)
    sys.stdout.write(table(rows) + "\n")
    sys.stdout.write(f"wrote {write_record(Path(options.output), {'rows': rows}, options)}\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
