"""Accuracy over the budget of FGSM: for each method the mean over its seeds, and a band from least to largest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import columns, groups, head, name

COLORS = ("#2b6cb0", "#d1802f", "#666666", "#2f855a", "#b83280", "#6b46c1", "#c53030", "#00838f", "#8a6d1b", "#111111")
STYLES = ("-", "--", ":")


def draw(experiment: str, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write the picture; False where there is nothing to draw, or no matplotlib to draw with."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = groups(row for row in rows if not row["diverged"])
    if not lines:
        return False
    title, keys = next(iter(columns(experiment).items()))
    budgets = [0.0, *keys]
    one_ratio = len({group[0]["rank_ratio"] for group in lines} - {None}) < 2
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(lines):
        runs = [[row["clean_on_attacked"], *(row["robust_accuracy"][key] for key in keys.values())] for row in group]
        values = list(zip(*runs, strict=True))
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
        label = head(group[0])[0] if one_ratio else name(group[0])
        axes.plot(budgets, [sum(v) / len(v) for v in values], marker="o", markersize=3, label=label, **style)
        axes.fill_between(budgets, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.1)
    axes.set(xlabel=f"ε of {title}, in pixels of [0, 1]", ylabel="accuracy", xlim=(0, None))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True
