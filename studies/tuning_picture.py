r"""The picture of docs/tuning.md: validation accuracy over the learning rate, from the sweeps of two studies.

    python -m studies.tuning_picture --lenet5 outputs/paper/lenet5_mnist/results.json \
        --vit outputs/vit_cifar10/results.json --output docs/tuning.png

Both records come from the commands in docs/results.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.record import option, parse
from studies.report import groups

COLORS = {
    "dense": "#666666",
    "unconstrained": "#d1802f",
    "tau=inf": "#2f855a",
    "tau=0.1": "#2b6cb0",
    "tau=0": "#6b46c1",
}


@dataclass
class Options:
    """Records to draw."""

    lenet5: str = field(metadata={"help": "Record of studies.paper.table."})
    vit: str = field(metadata={"help": "Record of studies.vit_small."})
    output: str = option("docs/tuning.png", "The picture.")


def draw(axes: Axes, title: str, sweep: list[dict[str, Any]]) -> None:
    """A line for each method, dashed where 80 % of the weights are removed; 0 where the training diverged."""
    for line in groups(row for row in sweep if row["method"] in COLORS):
        first = line[0]
        points = sorted(
            (row["learning_rate"], 0 if row["diverged"] else 100 * row["validation_accuracy"]) for row in line
        )
        style = "--" if (first.get("compression_ratio") or 0) > 0.7 else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=COLORS[first["method"]], label=first["label"])
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Draw."""
    (options,) = parse(Options)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, "LeNet5 on MNIST, SGD", json.loads(Path(options.lenet5).read_text())["sweep"])
    left.set_ylim(85, 100)
    draw(right, "Small ViT on CIFAR-10, AdamW", json.loads(Path(options.vit).read_text())["sweep"])
    figure.savefig(options.output, dpi=130)
    print("wrote", options.output)


if __name__ == "__main__":
    main()
