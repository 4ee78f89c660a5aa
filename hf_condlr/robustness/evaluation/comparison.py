"""`compare`: several models on the same samples, with differences that are paired sample by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_condlr.robustness.evaluation.report import RobustnessReport, columns, plot_reports
from hf_condlr.robustness.evaluation.rows import require


@dataclass
class RobustnessComparison:
    """The result of `compare`; `str()` is a table. The other models are compared with the first."""

    reports: list[RobustnessReport]

    @property
    def cases(self) -> list[tuple[str, float]]:
        """Every (threat, ε)."""
        return [(case.threat, case.epsilon) for case in self.reports[0].worst_cases]

    def difference(self, report: RobustnessReport, case: tuple[str, float] | None) -> tuple[float, float]:
        """Accuracy of `report` less that of the first, and its standard error, from paired outcomes.

        With d_i ∈ {−1, 0, 1} the difference at sample i: mean(d) ± √(var(d)/n). `case` None means without an attack.
        """
        ours, theirs = _outcomes(report, case), _outcomes(self.reports[0], case)
        d = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
        mean = sum(d) / len(d)
        return mean, math.sqrt(sum((x - mean) ** 2 for x in d)) / len(d)

    def __str__(self) -> str:
        first = self.reports[0]
        heads = ("clean", *(f"{threat} {epsilon:.4g}" for threat, epsilon in self.cases))
        rows: list[tuple[str, ...]] = [("model", *heads)]
        for report in self.reports:
            values = [f"{sum(_outcomes(report, case)) / report.samples:.1%}" for case in (None, *self.cases)]
            rows.append((report.model, *values))
            if report is not first:
                pairs = [self.difference(report, case) for case in (None, *self.cases)]
                rows.append((f"  less {first.model}", *(f"{100 * d:+.1f} ± {100 * se:.1f}" for d, se in pairs)))
        note = f"{first.samples:,} samples; worst case over the attacks of each threat and ε; ± one standard error"
        doubts = [f"{r.model}: {len(r.failed_checks)} checks failed" for r in self.reports if r.failed_checks]
        return "\n".join([*columns(rows, texts=1), note, *doubts])

    def to_dict(self) -> dict[str, Any]:
        """JSON values: differences from the first model, and every report."""
        differences = []
        for report in self.reports[1:]:
            for case in (None, *self.cases):
                (threat, epsilon), (mean, error) = case or (None, 0.0), self.difference(report, case)
                found = {"model": report.model, "threat": threat, "epsilon": epsilon}
                differences.append(found | {"difference": mean, "standard_error": error})
        return {"differences": differences, "reports": [report.to_dict() for report in self.reports]}

    def plot(self, path: str | Path) -> Path:
        """Worst-case accuracy over ε, a panel for each threat, a line for each model."""
        return plot_reports(self.reports, path)


def compare(reports: Sequence[RobustnessReport]) -> RobustnessComparison:
    """Compare reports of several models on the same samples under the same attacks.

    Raises:
        EvaluationError: There are none, two share a name, or they were not measured on the same samples, or not by the
            same attacks.
    """
    require(reports, "there must be reports to compare", "none", "Evaluate two models.")
    digests = {report.settings.get("samples_digest"): report.model for report in reports}
    received = f"different ones for {', '.join(digests.values())}"
    remedy = "Evaluate all models with the same data, max_samples and seed."
    require(len(digests) == 1, "reports must be of the same samples to be compared", received, remedy)
    names = [report.model for report in reports]
    unique, remedy = len(set(names)) == len(names), "Give evaluate_robustness a name for each model."
    require(unique, "reports must have names of their own to be compared", ", ".join(names), remedy)
    asked = [[attack.settings for attack in report.attacks] for report in reports]
    different = [report.model for report, attacks in zip(reports, asked, strict=True) if attacks != asked[0]]
    received = f"others than for {reports[0].model} for {', '.join(different)}"
    remedy = "Evaluate all models with the same attacks."
    require(not different, "reports must be of the same attacks to be compared", received, remedy)
    return RobustnessComparison(list(reports))


def _outcomes(report: RobustnessReport, case: tuple[str, float] | None) -> list[bool]:
    if case is None:
        return report.correct
    return next(c.survived for c in report.worst_cases if (c.threat, c.epsilon) == case)
