"""Checks of the outcomes of all samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.checks import Check, allowed
from hf_condlr.robustness.evaluation.outcomes import BatchOutcome


def check_outcomes(attacks: Sequence[Attack], batches: Sequence[BatchOutcome], expected: int) -> Iterator[Check]:
    """Check that all samples were counted, and that attacks kept their threat model and grow with ε."""
    n = sum(len(batch.correct) for batch in batches)
    counts = {len(batch.attacks) for batch in batches}
    yield Check(
        "every sample counted once",
        n == expected and counts == {len(attacks)},
        f"{n} outcomes of {expected} samples",
        "A process or a batch is missing, or samples were repeated: the denominator is wrong.",
    )
    moved, outside = _largest_moves(attacks, batches)
    over = [
        f"{name} at ε = {attack.epsilon:.4g}: {d:.6g}"
        for name, attack, d in moved
        if d > _with_rounding(attack.epsilon)
    ]
    yield Check(
        "examples within the ball and the bounds",
        not over and outside <= 1e-6 if moved else None,
        "; ".join(over) or f"{len(moved)} attacks measured, at most {outside:.1e} outside the bounds",
        "An attack left its threat model: its robust accuracy is too low.",
    )
    survived = [_survivors(batches, i, "survived") or 0 for i in range(len(attacks))]
    yield _falls_with_epsilon(attacks, survived, n)
    rounded = [(a, survived[i], _survivors(batches, i, "survived_rounded")) for i, a in enumerate(attacks)]
    gains = [((after - before) / n, attack) for attack, before, after in rounded if after is not None]
    gain, attack = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    yield Check(
        "examples hold as 8-bit images",
        gain <= max(0.02, 1 / n) if gains else None,
        f"at most {gain:.1%} more are classified correctly" + (f", under {attack.name}" if attack else ""),
        "The attack relies on differences smaller than a pixel's step: saved as images its examples are harmless.",
    )


def _largest_moves(
    attacks: Sequence[Attack], batches: Sequence[BatchOutcome]
) -> tuple[list[tuple[str, Attack, float]], float]:
    moved = []
    for i, attack in enumerate(attacks):
        distances = [d for batch in batches if (d := batch.attacks[i].moved) is not None]
        if distances:
            moved.append((attack.name, attack, max(distances)))
    return moved, max((outcome.outside for batch in batches for outcome in batch.attacks), default=0.0)


def _with_rounding(epsilon: float) -> float:
    """The largest distance of x + δ from x in float32, with its rounding errors."""
    return epsilon * (1 + 1e-5) + 1e-6


def _survivors(batches: Sequence[BatchOutcome], index: int, name: str) -> int | None:
    values = [getattr(batch.attacks[index], name) for batch in batches]
    return None if any(value is None for value in values) else sum(map(sum, values))


def _falls_with_epsilon(attacks: Sequence[Attack], survived: Sequence[int], n: int) -> Check:
    rises, series = [], 0
    by_family: dict[str, list[int]] = {}
    for i, attack in enumerate(attacks):
        if attack.adversarial:  # a stronger corruption does not contain a weaker one
            by_family.setdefault(repr(attack.with_epsilon(0)), []).append(i)
    for family in by_family.values():
        ordered = sorted(family, key=lambda i: attacks[i].epsilon)
        series += len(ordered) > 1
        for weak, strong in itertools.pairwise(ordered):
            if survived[strong] - survived[weak] > allowed(n, 0.005):
                at = [f"{survived[i] / n:.1%} at {attacks[i].epsilon:.4g}" for i in (weak, strong)]
                rises.append(f"{attacks[strong].name}: {', '.join(at)}")
    return Check(
        "robust accuracy falls with ε",
        not rises if series else None,
        "; ".join(rises) or (f"in all {series} series" if series else "one budget for each attack"),
        "A larger ball holds the smaller one: the attack does not find what is there.",
    )
