"""Table and picture of the study's rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_condlr.tables import markdown_table
from studies.record import mean_and_spread
from studies.report import largest

COLORS = ("#111111", "#8c8c8c", "#d1802f", "#b83280", "#2b6cb0", "#2f855a", "#6b46c1", "#c53030", "#319795", "#b7791f")


def table(rows: Sequence[dict[str, Any]], dense: dict[str, Any]) -> str:
    """A line for each method and ratio, mean ± standard deviation over the seeds; accuracies in %.

    The last columns compare with `dense`, the row of the model that was compressed, on the same samples: mean
    difference in points ± its standard error over the samples, clean and under the strongest attack.
    """
    columns = columns_of(rows[0])
    strongest = strongest_of(columns)
    lines = []
    for group in groups(rows):
        values = [[measured(row)[name] for row in group] for name in columns]
        kappa = max(largest(row["condition_numbers"]) for row in group)
        first = group[0]
        removed = f"{100 * first['ratio']:.0f} %" if first["ratio"] else "—"
        size, rate = f"{first['parameters'] / 1e6:.1f} M", f"{first['learning_rate']:g}" if first["steps"] else "—"
        clean = mean_and_spread([row["clean_accuracy"] for row in group])
        against = [difference([row["right"] for row in group], dense["right"])]
        against.append(difference([row["survived"][strongest] for row in group], dense["survived"][strongest]))
        facts = [f"{kappa:.3g}", size, f"{first['milliseconds']:.1f}", rate, len(group)]
        lines.append([first["label"], removed, clean, *map(mean_and_spread, values), *facts, *against])
    header = ["method", "removed", "clean", *columns.values(), "largest κ", "parameters", "ms", "rate", "seeds"]
    header += ["clean − dense", f"{columns[strongest]} − dense"]
    return markdown_table(header, lines, align="lr")


def difference(outcomes: Sequence[str], dense: str) -> str:
    """Points by which models are better than dense on the same samples, ± standard error over the samples."""
    values = [
        statistics.mean(map(int, sample)) - int(other)
        for sample, other in zip(zip(*outcomes, strict=True), dense, strict=True)
    ]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):+.1f} ± {100 * error:.1f}"


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that differ in their seed only."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if "right" in row:
            found.setdefault((row["ratio"], row["label"], row["steps"]), []).append(row)
    return list(found.values())


def columns_of(row: dict[str, Any]) -> dict[str, str]:
    """The columns of attacks, {name in `measured`: title}."""
    names = measured(row)
    titles = {}
    for name in names:
        threat, _, epsilon = name.partition(" ")
        unit = f"{round(float(epsilon) * 255, 3):g}/255" if threat == "linf" else epsilon
        titles[name] = f"PGD, ε = {unit}" if epsilon else name
    return titles


def strongest_of(columns: dict[str, str]) -> str:
    """The attack of the largest budget, the last one."""
    return [name for name in columns if name != "corruptions"][-1]


def measured(row: dict[str, Any]) -> dict[str, float]:
    """Accuracy under each attack, and the mean over the corruptions."""
    shares = {name: flags.count("1") / len(flags) for name, flags in row["survived"].items()}
    corrupted = [share for name, share in shares.items() if " " not in name]
    attacks = {name: share for name, share in shares.items() if " " in name}
    return attacks | ({"corruptions": statistics.mean(corrupted)} if corrupted else {})


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over parameters, and accuracy under the strongest attack over accuracy; a colour a method."""
    rows = [row for row in rows if "right" in row]
    columns = columns_of(rows[0])
    strongest = strongest_of(columns)
    title = columns[strongest]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for label, color in zip(labels, COLORS * math.ceil(len(labels) / len(COLORS)), strict=False):
        points = [
            [
                statistics.mean(values)
                for values in zip(
                    *((r["parameters"] / 1e6, 100 * r["clean_accuracy"], 100 * measured(r)[strongest]) for r in group),
                    strict=True,
                )
            ]
            for group in groups(rows)
            if group[0]["label"] == label
        ]
        size, clean, robust = zip(*sorted(points), strict=True)
        style = {
            "color": color,
            "marker": "*" if label == "dense" else "o",
            "ms": 10 if label == "dense" else 5,
            "label": label,
        }
        left.plot(size, clean, **style)
        right.plot(clean, robust, **style, linestyle="none")
    left.set(xlabel="parameters, millions", ylabel="test accuracy, %")
    right.set(xlabel="test accuracy, %", ylabel=f"accuracy under {title}, %")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)
