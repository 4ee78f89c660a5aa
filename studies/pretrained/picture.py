r"""One picture of several tables: accuracy under the strongest attack over clean accuracy, a panel for each task.

    python -m studies.pretrained.picture --records outputs/dinov2/results-0.json outputs/dinov2/results-120.json \
        outputs/minilm/results-0.json --output docs/results_pretrained.png

Filled points are models as they were compressed, rings those with a recovery; a line joins a method's points in the
order of the records.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.pretrained.methods import METHODS
from studies.pretrained.report import COLORS, columns_of, groups, measured, strongest_of
from studies.record import parse

MODELS = {"imagenette": "DINOv2-small on Imagenette", "sst2": "a text encoder on SST-2"}


@dataclass
class Options:
    """What is drawn."""

    records: list[str] = field(metadata={"help": "Files results-*.json of the study."})
    output: str = field(metadata={"help": "The picture."})
    ratio: float = field(default=0.6, metadata={"help": "Share removed of the models that are drawn, and dense."})
    names: list[str] | None = field(default=None, metadata={"help": "One for each record, written at its first point."})

    def __post_init__(self) -> None:
        if self.names is not None and len(self.names) != len(self.records):
            raise ValueError(f"names must be one for each record; received {len(self.names)} for {len(self.records)}")


def draw(records: list[dict[str, Any]], ratio: float, path: Path, names: list[str] | None = None) -> None:
    """A panel for each task of the records, in their order; `names` are those of the records."""
    names = names or [""] * len(records)
    tasks = list(dict.fromkeys(record["options"]["task"] for record in records))
    figure = Figure(figsize=(5.2 * len(tasks), 4.6), layout="constrained")
    legend: dict[str, Any] = {}
    methods = list(dict.fromkeys(row["method"] for record in records for row in record["rows"]))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = [
            (name, group)
            for name, record in zip(names, records, strict=True)
            if record["options"]["task"] == task
            for group in groups(record["rows"])
        ]
        columns = columns_of(found[0][1][0])
        strongest = strongest_of(columns)
        points: dict[str, list[tuple[float, float, bool]]] = {}
        named = ""
        for name, group in found:
            if group[0]["ratio"] in (0.0, ratio):
                x, y = (
                    100 * statistics.mean(values)
                    for values in (
                        [row["clean_accuracy"] for row in group],
                        [measured(row)[strongest] for row in group],
                    )
                )
                points.setdefault(group[0]["method"], []).append((x, y, bool(group[0]["steps"])))
                if named != name:  # at the first of its points
                    axes.annotate(name, (x, y), (9, 3), textcoords="offset points", fontsize=8)
                named = name
        for method, way in points.items():
            color = COLORS[methods.index(method) % len(COLORS)]
            axes.plot(*zip(*[(x, y) for x, y, _ in way], strict=True), color=color, lw=0.8)
            for x, y, recovered in way:
                marker, size = ("*", 12) if method == "dense" else ("o", 6)
                face = "white" if recovered else color
                axes.plot(x, y, marker, color=color, ms=size, mfc=face)
            legend.setdefault(METHODS[method].label, axes.plot([], [], "o", color=color)[0])
        axes.set(xlabel="test accuracy, %", ylabel=f"accuracy under {columns[strongest]}, %")
        axes.set_title(f"{MODELS[task]}, {100 * ratio:.0f} % of the encoder's weights removed", fontsize=9)
        axes.grid(alpha=0.25)
        axes.margins(x=0.25 if any(names) else 0.1)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Read the records, draw."""
    [options] = parse(Options)
    records = [json.loads(Path(record).read_text()) for record in options.records]
    draw(records, options.ratio, Path(options.output), options.names)
    print("wrote", options.output)


if __name__ == "__main__":
    main()
