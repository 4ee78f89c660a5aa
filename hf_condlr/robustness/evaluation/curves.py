"""Robust accuracy over ε as a picture: a panel for each threat, a line for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_condlr.errors import EvaluationError, MissingExtraError
from hf_condlr.files import replacing

if TYPE_CHECKING:
    from hf_condlr.robustness.evaluation.report import RobustnessReport


COLORS = ("#2b6cb0", "#d1802f", "#666666", "#2f855a", "#b83280", "#6b46c1", "#c53030", "#00838f")


LABELS = {"linf": "ℓ∞", "l2": "ℓ2", "embedding": "embeddings, relative ℓ2", "characters": "share of words changed"}


def draw(reports: Sequence[RobustnessReport], path: str | Path) -> Path:
    """Write the picture; the ending of `path` chooses the format.

    Reports that share a name are runs of one model (seeds): their mean is drawn, with a band from least to largest.

    Raises:
        MissingExtraError: matplotlib is not installed.
        EvaluationError: There is nothing to draw: no attack at all.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingExtraError(
            "plot needs matplotlib", received="no such package", remedy="pip install 'hf_condlr[plot]'."
        ) from error
    threats = list(dict.fromkeys(threat for report in reports for threat in report.threats))
    several = [threat for threat in threats if any(len(report.curve(threat)[0]) > 2 for report in reports)]
    threats = several or threats
    if not threats:
        raise EvaluationError("a curve needs an attack", received="none", remedy="Evaluate with at least one attack.")
    figure = Figure(figsize=(1.2 + 4.2 * len(threats), 3.9), layout="constrained")
    panels = figure.subplots(1, len(threats), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(report.model for report in reports))
    for axes, threat in zip(panels, threats, strict=True):
        for i, name in enumerate(names):
            curves = [r.curve(threat) for r in reports if r.model == name and threat in r.threats]
            # Only budgets that every run has: a mean over different ones would bend the line.
            x = sorted(set.intersection(*(set(budgets) for budgets, _ in curves))) if curves else []
            values = [[dict(zip(*curve, strict=True))[epsilon] for curve in curves] for epsilon in x]
            color = COLORS[i % len(COLORS)]
            axes.plot(x, [sum(v) / len(v) for v in values], "o-", color=color, markersize=4, linewidth=1.5, label=name)
            axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)
        axes.set(xlabel=f"ε ({LABELS.get(threat, threat)})", ylim=(0, 1.02), xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, worst case over attacks")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)
