"""Accuracy over the budget of FGSM: for each method the mean over its seeds, and a band from least to largest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_condlr.robustness.attacks import Attack
from studies.report import columns, groups

COLORS = ("#2b6cb0", "#d1802f", "#666666", "#2f855a", "#b83280", "#6b46c1", "#c53030", "#00838f", "#8a6d1b", "#111111")
STYLES = ("-", "--", ":")


def draw(attacks: Sequence[Attack], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture of the first attack of a study."""
    title, keys = next(iter(columns(attacks).items()))
    budgets = [0.0, *keys]
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups(row for row in rows if not row["diverged"])):
        runs = [[row["clean_on_attacked"], *(row["robust_accuracy"][key] for key in keys.values())] for row in group]
        values = list(zip(*runs, strict=True))
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
        mean = [sum(v) / len(v) for v in values]
        axes.plot(budgets, mean, marker="o", markersize=3, label=group[0]["label"], **style)
        axes.fill_between(budgets, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.1)
    axes.set(xlabel=f"ε of {title}, in pixels of [0, 1]", ylabel="accuracy", xlim=(0, None))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
