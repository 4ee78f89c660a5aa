"""`RobustnessReport`: accuracy under each attack and under all of them, as a table, JSON or a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_condlr.files import replacing
from hf_condlr.robustness.evaluation.curves import Curve, draw_curves


@dataclass
class Check:
    """A sign that an attack failed where a model did not resist; `passed` is None where the check does not apply."""

    name: str
    passed: bool | None
    found: str
    suspicion: str
    """Meaning of a failure."""

    def __str__(self) -> str:
        state = {True: "passed", False: "FAILED", None: "not applicable"}[self.passed]
        return f"{state}: {self.name}: {self.found}" + (f". {self.suspicion}" if self.passed is False else "")


@dataclass
class AttackResult:
    """Result of one attack with one budget; or, as worst case, of all attacks of one threat and budget together."""

    name: str
    threat: str
    """Threat model: `linf`, `l2`, `embedding`, `characters`, ..."""
    epsilon: float
    survived: list[bool]
    """For each sample: classified correctly under the attack, and without it unless it is a corruption."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every parameter of the attack."""
    rounded_accuracy: float | None = None
    """Robust accuracy after rounding to 8 bits; samples that rounding corrects are attacked further before it."""
    largest_distance: float | None = None
    """Largest distance of a sample from its original, in units of epsilon."""
    largest_excess: float = 0.0
    """Largest excess of a pixel over [0, 1]."""
    seconds: float = 0.0
    """Time of all processes together."""

    @property
    def robust_accuracy(self) -> float:
        """Share of all samples that survived."""
        return sum(self.survived) / len(self.survived)

    @property
    def budget(self) -> str:
        """ε as it is usually stated: of pixels in the ℓ∞ norm as a multiple of 1/255."""
        return f"{self.epsilon * 255:.3g}/255" if self.threat == "linf" else f"{self.epsilon:.3g}"

    @property
    def standard_error(self) -> float:
        """√(p(1 − p)/n) of the robust accuracy p: the error of the choice of samples alone."""
        p = self.robust_accuracy
        return math.sqrt(p * (1 - p) / len(self.survived))


@dataclass
class RobustnessReport:
    """Result of `evaluate_robustness`; `str()` is a table."""

    model: str
    labels: list[int]
    correct: list[bool]
    """For each sample: classified correctly without an attack."""
    attacks: list[AttackResult]
    checks: list[Check] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Data, seed, batch size, digests of the model and of the choice of samples."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples, the denominator of every accuracy."""
        return len(self.correct)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples classified correctly without an attack."""
        return sum(self.correct) / len(self.correct)

    @property
    def robust_accuracy(self) -> float:
        """Share of samples that survive every attack of the evaluation: each sample's worst case."""
        return sum(map(all, self._survived(self.attacks))) / self.samples

    @property
    def worst_cases(self) -> list[AttackResult]:
        """For each threat and budget, every sample's worst case over its attacks."""
        groups: dict[tuple[str, float], list[AttackResult]] = {}
        for attack in self.attacks:
            groups.setdefault((attack.threat, attack.epsilon), []).append(attack)
        return [
            AttackResult("worst case", threat, epsilon, [all(values) for values in self._survived(group)])
            for (threat, epsilon), group in groups.items()
        ]

    def _survived(self, attacks: list[AttackResult]) -> list[tuple[bool, ...]]:
        return list(zip(self.correct, *(attack.survived for attack in attacks), strict=True))

    def curve(self, threat: str) -> tuple[list[float], list[float]]:
        """Budgets from 0, and the worst-case accuracy at each."""
        points = sorted((case.epsilon, case.robust_accuracy) for case in self.worst_cases if case.threat == threat)
        return [0.0, *(epsilon for epsilon, _ in points)], [self.clean_accuracy, *(value for _, value in points)]

    def area(self, threat: str) -> float:
        """Expected robustness: ∫ accuracy dε / ε_max of the worst case over [0, ε_max], by the trapezoidal rule."""
        x, y = self.curve(threat)
        pieces = ((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))
        return sum(pieces) / x[-1] if x[-1] > 0 else y[0]

    @property
    def threats(self) -> list[str]:
        """Threats of the attacks, in their order."""
        return list(dict.fromkeys(attack.threat for attack in self.attacks))

    @property
    def failed_checks(self) -> list[Check]:
        """Checks that failed: reasons to doubt the numbers."""
        return [check for check in self.checks if check.passed is False]

    def __str__(self) -> str:
        rows = [("attack", "threat", "ε", "robust accuracy", "8-bit")]
        for attack in self.attacks:
            rounded = "" if attack.rounded_accuracy is None else f"{attack.rounded_accuracy:.1%}"
            rows.append((attack.name, attack.threat, f"{attack.epsilon:.4g}", percent(attack), rounded))
        for case in self.worst_cases:
            if sum((a.threat, a.epsilon) == (case.threat, case.epsilon) for a in self.attacks) > 1:
                rows.append((case.name, case.threat, f"{case.epsilon:.4g}", percent(case), ""))
        clean = AttackResult("clean", "", 0, self.correct)
        cases = [case for case in self.worst_cases if not case.threat.startswith("corruption")]
        robust = [f", {case.robust_accuracy:.1%} at {case.threat} ε = {case.budget}" for case in cases]
        lines = [f"{self.model}: {self.samples:,} samples, clean {percent(clean)}{''.join(robust)}"]
        lines += columns(rows, texts=2)
        lines.append(f"robust accuracy, each sample's worst case over all attacks: {self.robust_accuracy:.1%}")
        if self.checks:
            passed = sum(check.passed is True for check in self.checks)
            unmeasured = sum(check.passed is None for check in self.checks)
            lines.append(f"checks: {passed} passed, {len(self.failed_checks)} failed, {unmeasured} not applicable")
            lines += [f"  {check}" for check in self.failed_checks]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: every figure, each sample's outcome (1: survived), parameters, checks and versions."""
        attacks = [
            asdict(attack)
            | {"survived": bits(attack.survived)}
            | {"robust_accuracy": attack.robust_accuracy, "standard_error": attack.standard_error}
            for attack in self.attacks
        ]
        return {
            "model": self.model,
            "samples": self.samples,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "worst_cases": [
                {"threat": case.threat, "epsilon": case.epsilon, "robust_accuracy": case.robust_accuracy}
                for case in self.worst_cases
            ],
            "areas": {threat: self.area(threat) for threat in self.threats},
            "attacks": attacks,
            "checks": [asdict(check) for check in self.checks],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "correct": bits(self.correct),
            "labels": self.labels,
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON, in one step."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {key: stored[key] for key in ("model", "labels", "settings", "versions")}
        for attack in stored["attacks"]:
            del attack["robust_accuracy"], attack["standard_error"]
        attacks = [AttackResult(**attack | {"survived": flags(attack["survived"])}) for attack in stored["attacks"]]
        checks = [Check(**check) for check in stored["checks"]]
        return cls(**values, correct=flags(stored["correct"]), attacks=attacks, checks=checks)

    def card_entries(self) -> list[dict[str, Any]]:
        """Entries of `robustness` for `write_model_card`."""
        shown = ("norm", "steps", "restarts", "queries", "kind")
        return [
            {"attack": attack.name, "epsilon": attack.epsilon}
            | {name: attack.settings[name] for name in shown if name in attack.settings}
            | {"samples": self.samples, "accuracy": attack.robust_accuracy}
            for attack in self.attacks
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw worst-case accuracy over ε, a panel for each threat; see `plot_reports`."""
        return plot_reports([self], path)


def plot_reports(reports: Sequence[RobustnessReport], path: str | Path) -> Path:
    """Draw worst-case accuracy over ε, a panel for each threat, a line for each model; see `draw_curves`.

    Reports with the same model name are runs with different seeds: their mean is drawn, with a band.
    """
    panels: dict[str, dict[str, list[Curve]]] = {}
    for report in reports:
        for threat in report.threats:
            panels.setdefault(threat, {}).setdefault(report.model, []).append(report.curve(threat))
    return draw_curves(panels, path)


def percent(result: AttackResult) -> str:
    """Accuracy ± its standard error."""
    return f"{result.robust_accuracy:.1%} ± {result.standard_error:.1%}"


def columns(rows: Sequence[tuple[str, ...]], texts: int) -> list[str]:
    """Lines of an aligned table, the first `texts` columns to the left, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def bits(values: list[bool]) -> str:
    """Encode each sample's flag as one character, to keep files small."""
    return "".join("1" if value else "0" for value in values)


def flags(text: str) -> list[bool]:
    """The inverse of `bits`."""
    return [character == "1" for character in text]
