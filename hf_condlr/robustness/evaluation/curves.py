"""Accuracy over ε as a picture: a panel for each threat, a line for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_condlr.errors import MissingExtraError
from hf_condlr.files import replacing
from hf_condlr.robustness.evaluation.rows import require

Curve = tuple[Sequence[float], Sequence[float]]  # budgets, accuracies

COLORS = ("#2b6cb0", "#d1802f", "#666666", "#2f855a", "#b83280", "#6b46c1", "#c53030", "#00838f")
LABELS = {"linf": "ℓ∞", "l2": "ℓ2", "embedding": "embeddings, relative ℓ2", "characters": "share of words changed"}


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: str | Path) -> Path:
    """Write the picture.

    Args:
        panels: The curves of each model, by threat and the model's name. Several curves of one model are runs with
            different seeds: their mean is drawn, with a band from the smallest to the largest. Threats with a single
            budget are left out where there are others.
        path: File to write, whose suffix chooses the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
        EvaluationError: There are no curves.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        remedy = "pip install 'hf_condlr[plot]'."
        raise MissingExtraError("plot needs matplotlib", received="no such package", remedy=remedy) from error
    lines = {threat: [curve for curves in models.values() for curve in curves] for threat, models in panels.items()}
    threats = [threat for threat in panels if any(len(budgets) > 2 for budgets, _ in lines[threat])] or [*panels]
    require(threats, "a curve needs an attack", "none", "Evaluate with at least one attack.")
    figure = Figure(figsize=(1.2 + 4.2 * len(threats), 3.9), layout="constrained")
    subplots = figure.subplots(1, len(threats), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for models in panels.values() for name in models))
    for axes, threat in zip(subplots, threats, strict=True):
        for i, name in enumerate(names):
            curves = panels[threat].get(name, [])
            # Only budgets that all runs share: a mean over different runs would bend the line.
            x = sorted(set.intersection(*(set(budgets) for budgets, _ in curves))) if curves else []
            values = [[dict(zip(*curve, strict=True))[epsilon] for curve in curves] for epsilon in x]
            color = COLORS[i % len(COLORS)]
            axes.plot(x, [sum(v) / len(v) for v in values], "o-", color=color, markersize=4, linewidth=1.5, label=name)
            axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)
        axes.set(xlabel=f"ε ({LABELS.get(threat, threat)})", ylim=(0, 1.02), xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(alpha=0.25)
    subplots[0].set_ylabel("accuracy, worst case over attacks")
    figure.legend(*subplots[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)
