"""The picture of docs/tuning.md: validation accuracy over the learning rate, from the sweeps of two experiments.

    python benchmarks/tuning_picture.py --lenet5 outputs/paper/lenet5_mnist/results.json \
        --vit outputs/vit_cifar10/results.json --output docs/tuning.png

Both records come from the commands in docs/results.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import HfArgumentParser

COLORS = {
    "dense": "#666666",
    "unconstrained": "#d1802f",
    "tau=inf": "#2f855a",
    "tau=0.1": "#2b6cb0",
    "tau=0": "#6b46c1",
}
LABELS = {"tau=inf": "orthonormal U, V", "tau=0.1": "CondLR τ = 0.1", "tau=0": "CondLR τ = 0"}


@dataclass
class Options:
    """Records to draw."""

    lenet5: str = field(metadata={"help": "Record of recipes/paper/table.py."})
    vit: str = field(metadata={"help": "Record of vit_small.py."})
    output: str = field(default="docs/tuning.png", metadata={"help": "The picture."})


def curves(sweep: list[dict[str, Any]]) -> dict[tuple[str, float | None], dict[float, float]]:
    """{(method, share removed): {learning rate: validation accuracy}}; 0 where the training diverged."""
    found: dict[tuple[str, float | None], dict[float, float]] = {}
    for row in sweep:
        key = row.get("key", row)
        if key["method"] in COLORS:
            line = found.setdefault((key["method"], key.get("compression_ratio")), {})
            line[key["learning_rate"]] = 0.0 if row["diverged"] else 100 * row["validation_accuracy"]
    return found


def draw(axes: Axes, title: str, sweep: list[dict[str, Any]]) -> None:
    """A line for each method, dashed where 80 % of the weights are removed."""
    for (method, removed), line in curves(sweep).items():
        rates = sorted(line)
        label = LABELS.get(method, method) + (f", {removed:.0%} removed" if removed else "")
        style = "--" if removed and removed > 0.7 else "-"
        axes.plot(rates, [line[rate] for rate in rates], style, marker="o", color=COLORS[method], label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Draw."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    lenet5, vit = (json.loads(Path(path).read_text()) for path in (options.lenet5, options.vit))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, "LeNet5 on MNIST, SGD, rank ratio 0.2", lenet5["sweep"])
    left.set_ylim(85, 100)
    draw(right, "Small ViT on CIFAR-10, AdamW", vit["sweep"])
    figure.savefig(options.output, dpi=130)
    sys.stdout.write(f"wrote {options.output}\n")


if __name__ == "__main__":
    main()
