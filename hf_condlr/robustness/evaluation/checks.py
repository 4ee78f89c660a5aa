"""What a trusted evaluation checks by itself: signs that an attack failed where a model did not resist.

After Athalye et al. 2018 (obfuscated gradients) and Carlini et al. 2019 (on evaluating adversarial robustness). Those
that need further attacks are in `challenges.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked
from hf_condlr.robustness.evaluation.outcomes import BatchOutcome


@dataclass
class Check:
    """One check and what it found; `passed` is None where it does not apply."""

    name: str
    passed: bool | None
    found: str
    suspicion: str
    """What a failure means."""

    def __str__(self) -> str:
        state = {True: "passed", False: "FAILED", None: "not applicable"}[self.passed]
        return f"{state}: {self.name}: {self.found}" + (f". {self.suspicion}" if self.passed is False else "")


@dataclass
class CheckBatch:
    """Samples that the checks run on: their places in the evaluation, inputs and labels."""

    positions: list[int]
    inputs: Inputs
    labels: Tensor


def allowed(samples: int, share: float) -> int:
    """So many of the samples may disagree: a share of them, rounded up."""
    return math.ceil(share * samples)


def check_outcomes(attacks: Sequence[Attack], batches: Sequence[BatchOutcome], expected: int) -> Iterator[Check]:
    """From the outcomes of all samples."""
    n = sum(len(batch.correct) for batch in batches)
    counts = {len(batch.attacks) for batch in batches}
    yield Check(
        "every sample counted once",
        n == expected and counts == {len(attacks)},
        f"{n} outcomes of {expected} samples",
        "A process or a batch is missing, or samples were repeated: the denominator is wrong.",
    )
    moved, outside = _largest_moves(attacks, batches)
    over = [f"{name} at ε = {attack.epsilon:.4g}: {d:.6g}" for name, attack, d in moved if d > _rounded(attack.epsilon)]
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
        "The attack lives on differences smaller than a pixel's step: as image files its examples are harmless.",
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


def _rounded(epsilon: float) -> float:
    """x + δ in float32 moves x by δ up to a rounding of x ≤ 1."""
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


def check_model(
    model: nn.Module,
    batches: Sequence[CheckBatch],
    own_logits: Callable[[list[int]], Tensor | None],
    digests: tuple[str, str],
) -> Iterator[Check]:
    """Of the attacked model itself."""
    first = batches[0]
    with attacked(model), torch.no_grad():
        logits, again = model(first.inputs), model(first.inputs)
        own = own_logits(first.positions)
    scale = logits.abs().max().clamp_min(1e-30)
    difference = ((logits - again).abs().max() / scale).item()
    yield Check(
        "logits are repeatable",
        difference <= 1e-5 and bool(logits.isfinite().all()),
        f"a relative difference of {difference:.1e} between two calls",
        "The model is random (dropout outside evaluation mode?) or its logits are not finite: attack its expectation.",
    )
    sums = logits.sum(1)
    probabilities = bool(((logits >= 0) & (logits <= 1)).all() and (sums - 1).abs().max() < 1e-4)
    yield Check(
        "outputs are logits",
        not probabilities,
        f"values from {logits.min().item():.3g} to {logits.max().item():.3g}",
        "Rows sum to 1: after a softmax the gradients of confident samples vanish. Return what goes into it.",
    )
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    yield Check(
        "float32 in the attack",
        logits.dtype in (torch.float32, torch.float64) and not half,
        f"logits in {str(logits.dtype).removeprefix('torch.')}" + (", parameters in half precision" if half else ""),
        "Half precision rounds the loss that is climbed, and its gradient: attack model.float().",
    )
    gap = None if own is None else ((logits - own).abs().max() / scale).item()
    yield Check(
        "the attacked model is the model",
        digests[0] == digests[1] and (gap is None or gap <= (0.1 if half else 1e-3)),
        ("its parameters stayed" if digests[0] == digests[1] else "its parameters changed")
        + ("" if gap is None else f"; logits differ by {gap:.1e} from those of its own preprocessing"),
        "Another normalisation, tokenisation or state than the one in use was attacked.",
    )
