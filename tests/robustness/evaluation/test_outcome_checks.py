"""Checks of outcomes: each has an attack, or outcomes, made to fail it."""

from dataclasses import dataclass

import pytest
from torch import nn

from hf_condlr.robustness.attacks import FGSM, PGD, Corruption
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation import AttackResult, RobustnessReport
from hf_condlr.robustness.evaluation.checks import check_outcomes
from tests import classifiers
from tests.robustness.evaluation.evaluation import checked, fails


@dataclass(frozen=True)
class Outside(Attack):
    """FGSM of twice the radius."""

    epsilon: float
    name, threat = "outside", "linf"

    def __call__(self, model, inputs, labels):
        return FGSM(2 * self.epsilon)(model, inputs, labels)

    def distance(self, model, inputs, adversarial):
        return (adversarial - inputs).flatten(1).abs().amax(1)


@dataclass(frozen=True)
class Negative(Outside):
    """Leaves the bounds."""

    def __call__(self, model, inputs, labels):
        return FGSM(self.epsilon, clip=False)(model, inputs, labels)


@pytest.mark.parametrize("attack", [Outside, Negative])
def test_examples_outside_the_ball_or_the_bounds(attack):
    _, checks = checked(classifiers.pixel_mlp(), [attack(0.1)])
    assert "examples within the ball and the bounds" in fails(checks)


@dataclass(frozen=True)
class Weaker(Attack):
    """The larger its radius the less it does."""

    epsilon: float
    name, threat = "weaker", "linf"

    def __call__(self, model, inputs, labels):
        return FGSM(0.01 / self.epsilon)(model, inputs, labels)


def test_accuracy_that_rises_with_the_radius():
    _, checks = checked(classifiers.pixel_mlp(), [Weaker(0.05), Weaker(0.5)])
    assert "robust accuracy falls with ε" in fails(checks)
    assert "weaker: " in checks["robust accuracy falls with ε"].found
    _, checks = checked(classifiers.pixel_mlp(), [Weaker(0.05)])
    assert checks["robust accuracy falls with ε"].passed is None


class Steep(nn.Module):
    """Right at exact 8-bit values only: what half a level changes, rounding corrects."""

    def __init__(self):
        super().__init__()
        self.inner = classifiers.pixel_mlp()

    def forward(self, x):
        off = (x * 255 - (x * 255).round()).flatten(1).abs().mean(1, keepdim=True)
        return self.inner(x) * (1 - 20 * off)


def test_examples_that_rounding_undoes():
    _, checks = checked(Steep(), [FGSM(0.4 / 255)])
    assert "examples hold as 8-bit images" in fails(checks)


def outcome_checks(attacks, survived, expected=200):
    n = max(map(len, survived))
    results = [AttackResult(a.name, a.threat, a.epsilon, flags) for a, flags in zip(attacks, survived, strict=True)]
    report = RobustnessReport("m", [0] * n, [True] * n, results)
    return {check.name: check.passed for check in check_outcomes(attacks, report, expected)}


def test_more_survivors_than_allowed_are_counted_as_integers_and_corruptions_left_out():
    for more, passed in ((1, True), (2, False)):
        survived = [[True] * 100 + [False] * 100, [True] * (100 + more) + [False] * (100 - more)]
        assert outcome_checks([PGD(0.1), PGD(0.2)], survived)["robust accuracy falls with ε"] is passed
    noise = [Corruption("shot_noise", 1), Corruption("shot_noise", 2)]
    assert outcome_checks(noise, survived)["robust accuracy falls with ε"] is None


def test_a_missing_batch_is_noticed():
    for samples, passed in ((200, True), (199, False), (400, False)):
        assert outcome_checks([PGD(0.1)], [[True] * samples])["every sample counted once"] is passed
    assert outcome_checks([PGD(0.1), PGD(0.2)], [[True] * 200, []])["every sample counted once"] is False
