"""Further attacks on a few samples: if they break what the evaluation calls robust, its numbers are too good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks import TextModel, make_attack
from hf_condlr.robustness.attacks.base import Attack, Inputs, take
from hf_condlr.robustness.evaluation.batch import predict
from hf_condlr.robustness.evaluation.report import AttackResult, Check

LEAST_STEPS = 20
QUERIES = 300
# For each threat: the gradient attack, its single step, and a search without gradients.
FAMILIES = {
    "linf": ("pgd-linf", "fgsm", "square-linf"),
    "l2": ("pgd-l2", "fgm-l2", "square-l2"),
    "embedding": ("pgd-embedding", "fgm-embedding", "search-embedding"),
}


class CheckBatch(NamedTuple):
    """Samples that are checked: their positions in the evaluation, inputs and labels."""

    positions: Sequence[int]
    inputs: Inputs
    labels: Tensor


@dataclass
class CheckedCase:
    """The model, the samples to attack again, and the worst case that the evaluation reports for one budget."""

    model: nn.Module
    batches: Sequence[CheckBatch]
    case: AttackResult
    correct: list[bool]
    """For each sample of the evaluation: classified correctly without an attack."""
    steps: int

    def broken(self, attack: Attack, among: list[bool], batches: Sequence[CheckBatch] | None = None) -> tuple[int, int]:
        """How many of the samples that `among` marks the attack has misclassified, and how many it marks."""
        wrong = total = 0
        for positions, inputs, labels in batches or self.batches:
            index = torch.tensor([i for i, p in enumerate(positions) if among[p]], dtype=torch.long)
            if len(index):
                part, y = take(inputs, index), labels[index.to(labels.device)]
                adversarial = attack.reseeded(positions[0] + 1)(self.model, part, y)
                wrong += int((~predict(self.model, adversarial, y)[0]).sum())
                total += len(index)
        return wrong, total

    def unmoved(self) -> tuple[int, int]:
        """How many samples a gradient step does not move, and how many could be moved: texts need editable tokens."""
        attack = make_attack(FAMILIES[self.case.threat][1], max(self.case.epsilon, 1e-3))
        unmoved = total = 0
        for _, inputs, labels in self.batches:
            still = torch.as_tensor(attack.distance(self.model, inputs, attack(self.model, inputs, labels)) == 0)
            texts = isinstance(self.model, TextModel)
            movable = self.model.editable(inputs).any(1) if texts else torch.ones_like(still)  # type: ignore[operator]
            unmoved, total = unmoved + int((still & movable).sum()), total + int(movable.sum())
        return unmoved, total

    def costs(self, quick: bool) -> list[float]:
        """Relative durations of the checks that `attack_checks` yields, in gradient steps."""
        further = [6 * self.steps, self.steps, QUERIES / 2, 100 / len(self.batches)]
        return [1.0, 1.0, 1.0, *([] if quick else further)]


def attack_checks(c: CheckedCase, *, quick: bool = False) -> Iterator[Check]:
    """Every check of one threat, at the budget of `c.case`; `quick`: only those of a single step."""
    threat, epsilon, steps = c.case.threat, c.case.epsilon, c.steps
    gradient, one_step, black_box = FAMILIES[threat]
    samples = sum(len(batch.positions) for batch in c.batches)

    def robust_to(attack: Attack, name: str, share: float, suspicion: str) -> Check:
        wrong, total = c.broken(attack, c.case.survived)
        found = f"{attack.name} breaks {wrong} of {total} samples called robust, {samples} checked"
        passed = wrong <= allowed(samples, share) if total else None
        return Check(f"{name} ({threat}, ε = {epsilon:.4g})", passed, found, suspicion)

    wrong, total = c.broken(make_attack(gradient, 0.0, steps=1), c.correct)
    yield Check(
        f"no change at ε = 0 ({threat})",
        wrong == 0 if total else None,
        f"{wrong} of {total} correct samples misclassified",
        "The attacked model is another one than the evaluated one, or its answers are random.",
    )
    unmoved, movable = c.unmoved()
    yield Check(
        f"gradients are not zero ({threat})",
        unmoved <= allowed(movable, 0.05) if movable else None,
        f"zero for {unmoved} of {movable} samples",
        "Saturated or quantised outputs mask the gradient: add the margin loss and a black-box attack.",
    )
    suspicion = "The attack is badly set: raise steps."
    yield robust_to(make_attack(one_step, epsilon), "no weaker than one step", 0.002, suspicion)
    if quick:
        return
    suspicion = f"{2 * steps} steps and 3 restarts find more: raise both until nothing changes."
    yield robust_to(make_attack(gradient, epsilon, steps=2 * steps, restarts=3, seed=1), "converged", 0.02, suspicion)
    attack = make_attack(gradient, epsilon, steps=steps, loss="margin", seed=2)
    suspicion = "Large logits saturate the cross entropy: attack with the margin loss, too."
    yield robust_to(attack, "margin loss finds no more", 0.02, suspicion)
    attack = make_attack(black_box, epsilon, queries=QUERIES)
    suspicion = "A search without gradients beats the attack that has them: gradients are masked."
    yield robust_to(attack, "no gradient masking", 0.002, suspicion)
    first = c.batches[:1]
    huge = {"linf": 1.0, "embedding": 10.0}.get(threat) or first[0].inputs[0].numel() ** 0.5  # contains every input
    attack = make_attack(gradient, huge, steps=50, loss="margin", restarts=2)
    wrong, total = c.broken(attack, c.correct, first)
    yield Check(
        f"nothing survives a huge ε ({threat})",
        total - wrong <= allowed(total, 0.05) if total else None,
        f"{total - wrong} of {total} samples survive ε = {huge:.4g}",
        "Nothing should resist a budget that contains every input: the attack does not find what is there.",
    )


def checked_cases(
    model: nn.Module, batches: Sequence[CheckBatch], correct: list[bool], cases: Sequence[AttackResult], steps: int
) -> Iterator[CheckedCase]:
    """For each threat with gradient attacks, the budget where about half of the correct samples survive.

    There most samples lie near the decision boundary, where weak and strong attacks differ most.
    """
    right = sum(correct)
    for threat in FAMILIES:
        found = [case for case in cases if case.threat == threat and case.epsilon > 0]
        if found and right:
            case = min(found, key=lambda case: (abs(sum(case.survived) - right / 2), -case.epsilon))
            yield CheckedCase(model, batches, case, correct, max(steps, LEAST_STEPS))


def allowed(samples: int, share: float) -> int:
    """Number of samples that may disagree: a share of them, rounded up."""
    return math.ceil(share * samples)
