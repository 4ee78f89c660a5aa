"""Further attacks on a few samples: if they break what the evaluation calls robust, its numbers are too good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_condlr.robustness.attacks import TextModel, make_attack
from hf_condlr.robustness.attacks.base import Attack, Inputs, take
from hf_condlr.robustness.evaluation.batch import predict
from hf_condlr.robustness.evaluation.checks import Check, CheckBatch, allowed
from hf_condlr.robustness.evaluation.report import AttackResult

LEAST_STEPS = 20
QUERIES = 300


@dataclass(frozen=True)
class Family:
    """Names of the attacks of one threat that the checks need."""

    gradient: str
    one_step: str
    black_box: str
    huge: Callable[[Inputs], float]
    """A budget that contains every input."""


FAMILIES = {
    "linf": Family("pgd-linf", "fgsm", "square-linf", huge=lambda inputs: 1.0),
    "l2": Family("pgd-l2", "fgm-l2", "square-l2", huge=lambda inputs: inputs[0].numel() ** 0.5),
    "embedding": Family("pgd-embedding", "fgm-embedding", "search-embedding", huge=lambda inputs: 10.0),
}


@dataclass
class CheckedCase:
    """The model, the samples to attack again, and the worst case that the evaluation reports for one budget."""

    model: nn.Module
    batches: Sequence[CheckBatch]
    case: AttackResult
    correct: list[bool]
    """For each sample of the evaluation: classified correctly without an attack."""
    steps: int

    @property
    def family(self) -> Family:
        """The attacks of the case's threat."""
        return FAMILIES[self.case.threat]

    @property
    def samples(self) -> int:
        """Number of samples to attack again."""
        return sum(len(batch.positions) for batch in self.batches)

    def broken(self, attack: Attack, among: list[bool]) -> tuple[int, int]:
        """How many of the samples that `among` marks the attack has misclassified, and how many it marks."""
        wrong = total = 0
        for batch in self.batches:
            index = torch.tensor([i for i, p in enumerate(batch.positions) if among[p]], dtype=torch.long)
            if not len(index):
                continue
            inputs, labels = take(batch.inputs, index), batch.labels[index.to(batch.labels.device)]
            adversarial = attack.reseeded(batch.positions[0] + 1)(self.model, inputs, labels)
            wrong += int((~predict(self.model, adversarial, labels)[0]).sum())
            total += len(index)
        return wrong, total

    def unmoved(self) -> tuple[int, int]:
        """How many samples a gradient step does not move, and how many could be moved: texts need editable tokens."""
        attack = make_attack(self.family.one_step, max(self.case.epsilon, 1e-3))
        unmoved = total = 0
        for batch in self.batches:
            distance = attack.distance(self.model, batch.inputs, attack(self.model, batch.inputs, batch.labels))
            still = torch.as_tensor(distance == 0)
            movable = torch.ones_like(still)
            if isinstance(self.model, TextModel):
                movable = self.model.editable(batch.inputs).any(1)
            unmoved, total = unmoved + int((still & movable).sum()), total + int(movable.sum())
        return unmoved, total

    def costs(self, quick: bool) -> list[float]:
        """Relative durations of the checks that `attack_checks` yields, in gradient steps."""
        further = [6 * self.steps, self.steps, QUERIES / 2, 100 / len(self.batches)]
        return [1.0, 1.0, 1.0, *([] if quick else further)]


def attack_checks(c: CheckedCase, *, quick: bool = False) -> Iterator[Check]:
    """Every check of one threat, at the budget of `c.case`; `quick`: only those of a single step."""
    family, threat, epsilon = c.family, c.case.threat, c.case.epsilon

    def robust_to(attack: Attack, name: str, share: float, suspicion: str) -> Check:
        wrong, total = c.broken(attack, c.case.survived)
        found = f"{attack.name} breaks {wrong} of {total} samples called robust, {c.samples} checked"
        passed = wrong <= allowed(c.samples, share) if total else None
        return Check(f"{name} ({threat}, ε = {epsilon:.4g})", passed, found, suspicion)

    wrong, total = c.broken(make_attack(family.gradient, 0.0, steps=1), c.correct)
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
    one_step = make_attack(family.one_step, epsilon)
    yield robust_to(one_step, "no weaker than one step", 0.002, "The attack is badly set: raise steps.")
    if quick:
        return
    yield robust_to(
        make_attack(family.gradient, epsilon, steps=2 * c.steps, restarts=3, seed=1),
        "converged",
        0.02,
        f"{2 * c.steps} steps and 3 restarts find more: raise both until nothing changes.",
    )
    yield robust_to(
        make_attack(family.gradient, epsilon, steps=c.steps, loss="margin", seed=2),
        "margin loss finds no more",
        0.02,
        "Large logits saturate the cross entropy: attack with the margin loss beside it.",
    )
    yield robust_to(
        make_attack(family.black_box, epsilon, queries=QUERIES),
        "no gradient masking",
        0.002,
        "A search without gradients beats the attack that has them: gradients are masked, robustness is not proven.",
    )
    huge = family.huge(c.batches[0].inputs)
    first = replace(c, batches=c.batches[:1])
    attack = make_attack(family.gradient, huge, steps=50, loss="margin", restarts=2)
    wrong, total = first.broken(attack, c.correct)
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
