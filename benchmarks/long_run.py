"""Fifty thousand optimizer steps: does anything drift? Constraint, memory and the time of a step, and their picture.

The MLP and the digits of `projection_interval.py`, AdamW at a constant learning rate, with fresh noise on the pixels of
each batch, so that gradients never vanish. **Every** step is checked in float64: ‖UᵀU − I‖_F and ‖VᵀV − I‖_F over √r,
and κ(S) over the bound in force, minus 1. Times are processor time of this one thread, which other programs on the
machine hardly touch. Rows are windows of `window` steps: largest errors, median time, resident memory at the end.

    python -m benchmarks.long_run --picture docs/long_run.png
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import projection_interval
from benchmarks.models import worst_errors
from benchmarks.timing import CommonOptions, run
from hf_condlr import attach_manifold_step
from hf_condlr.options import option
from hf_condlr.tables import markdown_table

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 32, 3e-3, 0.01
NOISE = 0.3  # standard deviation, on pixels in [0, 1]
MIB = 2**20
# (key of a row, label of its panel, what is guaranteed)
PANELS = (
    ("orthonormality_error", "largest ‖UᵀU − I‖_F / √r", 1e-5),
    ("kappa_excess", "largest κ / bound − 1", 1e-4),
    ("memory_mib", "resident memory, MiB", None),
    ("milliseconds", "a training step, ms (median)", None),
)


@dataclass
class Options(CommonOptions):
    """The training."""

    steps: int = option(50_000, "Optimizer steps.")
    window: int = option(500, "Steps that a row of the record sums up.")
    warmup_steps: int = option(5_000, "Optimizer steps until the bound on κ is 1 + τ.")
    picture: str = option("", "Where the picture goes; none without it.")


def batches(split: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches with fresh noise."""
    X, y = split
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(y), generator=generator).split(BATCH_SIZE):
            noise = torch.randn(X[index].shape, generator=generator)
            yield (X[index] + NOISE * noise).clamp(0, 1), y[index]


def measure(options: Options) -> Iterator[list[dict[str, float]]]:
    """A row for each window."""
    data, model = projection_interval.load(), projection_interval.build(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    handle = attach_manifold_step(optimizer, model, warmup_steps=options.warmup_steps)
    source, process, rows = batches(data["train"]), psutil.Process(), []
    found: list[tuple[float, float, float, float]] = []
    for step in range(1, options.steps + 1):
        X, y = next(source)
        start = time.process_time()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.process_time() - start
        found.append((*worst_errors(handle.layers), seconds, loss.item()))
        if step % options.window == 0:
            orthonormality, kappa, times, losses = zip(*found, strict=True)
            found = []
            rows.append(
                {
                    "step": step,
                    "orthonormality_error": max(orthonormality),
                    "kappa_excess": max(kappa) - 1,
                    "bound": max(handle.bounds().values()),
                    "milliseconds": 1e3 * statistics.median(times),
                    "memory_mib": process.memory_info().rss / MIB,
                    "loss": statistics.mean(losses),
                    "validation_accuracy": projection_interval.accuracy(model, data["validation"]),
                }
            )
    if options.picture:
        draw(rows, options.picture)
    yield rows


def draw(rows: list[dict[str, float]], path: str) -> None:
    """Four panels over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (key, label, limit) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        values = [row[key] for row in rows]
        axes.plot([row["step"] for row in rows], values, color="#2b6cb0")
        if limit is not None:
            axes.axhline(limit, color="#d1802f", linestyle="--", label=f"guaranteed: {limit:g}")
            axes.legend(frameon=False, fontsize=8)
            axes.set_yscale("symlog", linthresh=1e-7)
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
        worst = [f"{max(row[key] for row in part):.1e}" for key in ("orthonormality_error", "kappa_excess")]
        memory, accuracy = f"{part[-1]['memory_mib']:.1f}", f"{100 * part[-1]['validation_accuracy']:.1f}"
        time_of_step = f"{statistics.median(row['milliseconds'] for row in part):.2f}"
        lines.append([part[-1]["step"], *worst, memory, time_of_step, accuracy])
    header = ["up to step", "‖UᵀU − I‖_F / √r", "κ / bound − 1", "memory, MiB", "a step, ms", "accuracy, %"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    run(Options, measure, table)
