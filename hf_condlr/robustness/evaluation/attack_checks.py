"""Further attacks on a few samples: what they break that the evaluation calls robust says its numbers are too good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_condlr.robustness.attacks import FGSM, PGD, EmbeddingFGM, EmbeddingPGD, EmbeddingSearch, Square
from hf_condlr.robustness.attacks.base import Attack, Inputs, take
from hf_condlr.robustness.evaluation.batch import predict
from hf_condlr.robustness.evaluation.checks import Check, CheckBatch, allowed
from hf_condlr.robustness.evaluation.report import AttackResult

LEAST_STEPS = 20


QUERIES = 300


@dataclass(frozen=True)
class Family:
    """The attacks of one threat that a check needs."""

    gradient: Callable[..., Any]
    one_step: Callable[..., Attack]
    black_box: Callable[..., Attack]
    huge: Callable[[Inputs], float]
    """A budget that contains every input."""


FAMILIES = {
    "linf": Family(
        gradient=lambda epsilon, **options: PGD(epsilon, "linf", **options),
        one_step=FGSM,
        black_box=lambda epsilon: Square(epsilon, "linf", queries=QUERIES),
        huge=lambda inputs: 1.0,
    ),
    "l2": Family(
        gradient=lambda epsilon, **options: PGD(epsilon, "l2", **options),
        one_step=lambda epsilon: FGSM(epsilon, norm="l2"),
        black_box=lambda epsilon: Square(epsilon, "l2", queries=QUERIES),
        huge=lambda inputs: inputs[0].numel() ** 0.5,
    ),
    "embedding": Family(
        gradient=EmbeddingPGD,
        one_step=EmbeddingFGM,
        black_box=lambda epsilon: EmbeddingSearch(epsilon, queries=QUERIES),
        huge=lambda inputs: 10.0,
    ),
}


@dataclass
class Challenger:
    """The model, the samples to check on, and what the evaluation called robust at one budget of one threat."""

    model: nn.Module
    batches: Sequence[CheckBatch]
    case: AttackResult
    """The worst case reported."""
    correct: list[bool]
    steps: int

    @property
    def family(self) -> Family:
        """The attacks to choose from."""
        return FAMILIES[self.case.threat]

    @property
    def samples(self) -> int:
        """To check on."""
        return sum(len(batch.positions) for batch in self.batches)

    def broken(self, attack: Attack, among: list[bool]) -> tuple[int, int]:
        """How many of those samples that `among` marks the attack has misclassified, and how many they are."""
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

    def still(self) -> int:
        """How many samples a gradient step does not move."""
        attack, still = self.family.one_step(max(self.case.epsilon, 1e-3)), 0
        for batch in self.batches:
            distance = attack.distance(self.model, batch.inputs, attack(self.model, batch.inputs, batch.labels))
            still += int((distance == 0).sum()) if distance is not None else 0
        return still


def challenges(c: Challenger) -> Iterator[Check]:
    """Every check of one threat, at the budget of `c.case`."""
    family, threat, epsilon = c.family, c.case.threat, c.case.epsilon
    where = f" ({threat}, ε = {epsilon:.4g})"

    def challenge(name: str, attack: Attack, share: float, suspicion: str) -> Check:
        wrong, total = c.broken(attack, c.case.survived)
        found = f"{attack.name} breaks {wrong} of {total} samples called robust, {c.samples} checked"
        return Check(name + where, wrong <= allowed(c.samples, share) if total else None, found, suspicion)

    wrong, total = c.broken(family.gradient(0.0), c.correct)
    yield Check(
        f"no change at ε = 0 ({threat})",
        wrong == 0 if total else None,
        f"{wrong} of {total} correct samples misclassified",
        "The attacked model is another one than the evaluated one, or its answers are random.",
    )
    still = c.still()
    yield Check(
        f"gradients are not zero ({threat})",
        still <= allowed(c.samples, 0.05),
        f"zero for {still} of {c.samples} samples",
        "Saturated or quantised outputs mask the gradient: add the margin loss and a black-box attack.",
    )
    yield challenge("no weaker than one step", family.one_step(epsilon), 0.002, "The attack is badly set: raise steps.")
    yield challenge(
        "converged",
        family.gradient(epsilon, steps=2 * c.steps, restarts=3, seed=1),
        0.02,
        f"{2 * c.steps} steps and 3 restarts find more: raise both until nothing changes.",
    )
    yield challenge(
        "margin loss finds no more",
        family.gradient(epsilon, steps=c.steps, loss="margin", seed=2),
        0.02,
        "Large logits saturate the cross entropy: attack with the margin loss beside it.",
    )
    yield challenge(
        "no gradient masking",
        family.black_box(epsilon),
        0.002,
        "A search without gradients beats the attack that has them: gradients are masked, robustness is not proven.",
    )
    huge = family.huge(c.batches[0].inputs)
    few = replace(c, batches=c.batches[:1])
    wrong, total = few.broken(family.gradient(huge, steps=50, loss="margin", restarts=2), c.correct)
    yield Check(
        f"nothing survives a huge ε ({threat})",
        total - wrong <= allowed(total, 0.05) if total else None,
        f"{total - wrong} of {total} samples survive ε = {huge:.4g}",
        "Nothing should resist a budget that contains every input: the attack does not find what is there.",
    )


def challengers(
    model: nn.Module, batches: Sequence[CheckBatch], correct: list[bool], cases: Sequence[AttackResult], steps: int
) -> Iterator[Challenger]:
    """One for each threat that has gradient attacks, at the budget where about half of what was correct survives.

    There most samples lie near the border, where a weak attack is told from a strong one.
    """
    right = sum(correct)
    for threat in FAMILIES:
        found = [case for case in cases if case.threat == threat and case.epsilon > 0]
        if found and right:
            case = min(found, key=lambda case: (abs(sum(case.survived) - right / 2), -case.epsilon))
            yield Challenger(model, batches, case, correct, max(steps, LEAST_STEPS))
