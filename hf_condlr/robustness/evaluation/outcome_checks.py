"""Checks of the outcomes of all samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.checks import Check, allowed
from hf_condlr.robustness.evaluation.report import AttackResult, RobustnessReport


def check_outcomes(attacks: Sequence[Attack], report: RobustnessReport, expected: int) -> Iterator[Check]:
    """Check that all samples were counted, that attacks kept their threat model, and that more budget does more."""
    n, results = report.samples, report.attacks
    yield Check(
        "every sample counted once",
        n == expected and all(len(result.survived) == n for result in results) and len(results) == len(attacks),
        f"{n} outcomes of {expected} samples",
        "A process or a batch is missing, or samples were repeated: the denominator is wrong.",
    )
    measured = [(result, d) for result in results if (d := result.largest_distance) is not None]
    outside = max((result.largest_excess for result in results), default=0.0)
    # x + δ in float32 has rounding errors.
    over = [(result, d) for result, d in measured if d > result.epsilon * (1 + 1e-5) + 1e-6]
    yield Check(
        "examples within the ball and the bounds",
        not over and outside <= 1e-6 if measured else None,
        "; ".join(f"{result.name} at ε = {result.epsilon:.4g}: {d:.6g}" for result, d in over)
        or f"{len(measured)} attacks measured, at most {outside:.1e} outside the bounds",
        "An attack left its threat model: its robust accuracy is too low.",
    )
    yield _falls_with_epsilon(attacks, results, n)
    gains = [(a.rounded_accuracy - a.robust_accuracy, a.name) for a in results if a.rounded_accuracy is not None]
    gain, name = max(gains, default=(0.0, ""))
    yield Check(
        "examples hold as 8-bit images",
        gain <= max(0.02, 1 / n) if gains else None,
        f"at most {gain:.1%} more are classified correctly" + (f", under {name}" if name else ""),
        "The attack relies on differences smaller than a pixel's step: saved as images its examples are harmless.",
    )


def _falls_with_epsilon(attacks: Sequence[Attack], results: Sequence[AttackResult], n: int) -> Check:
    rises, series = [], 0
    by_family: dict[str, list[AttackResult]] = {}
    for attack, result in zip(attacks, results, strict=False):
        if attack.adversarial:  # a stronger corruption does not contain a weaker one
            by_family.setdefault(repr(attack.with_epsilon(0)), []).append(result)
    for family in by_family.values():
        series += len(family) > 1
        for weak, strong in itertools.pairwise(sorted(family, key=lambda result: result.epsilon)):
            if sum(strong.survived) - sum(weak.survived) > allowed(n, 0.005):
                at = [f"{result.robust_accuracy:.1%} at {result.epsilon:.4g}" for result in (weak, strong)]
                rises.append(f"{strong.name}: {', '.join(at)}")
    return Check(
        "robust accuracy falls with ε",
        not rises if series else None,
        "; ".join(rises) or (f"in all {series} series" if series else "one budget for each attack"),
        "A larger ball contains the smaller one: the attack does not find what is there.",
    )
