"""Each sanity check has a model, or an attack, made to fail it; a sound evaluation passes them all."""

import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_condlr import evaluate_robustness
from hf_condlr.robustness.attacks import FGSM, PGD, Corruption, PixelModel
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation import AttackResult, RobustnessReport
from hf_condlr.robustness.evaluation.outcome_checks import check_outcomes
from tests import classifiers

SOUND = [PGD(k / 255, steps=20) for k in (4, 16, 32)]
NAMES = (
    "every sample counted once",
    "examples within the ball and the bounds",
    "robust accuracy falls with ε",
    "examples hold as 8-bit images",
    "logits are repeatable",
    "outputs are logits",
    "pixels are spread as the processor expects",
    "float32 in the attack",
    "the attacked model is the model",
    "no change at ε = 0",
    "gradients are not zero",
    "no weaker than one step",
    "converged",
    "margin loss finds no more",
    "no gradient masking",
    "nothing survives a huge ε",
)


def checked(model, attacks=SOUND, dataset=None, **options):
    report = evaluate_robustness(
        model, dataset or classifiers.Pairs(), attacks, progress=False, **{"check_samples": 96} | options
    )
    return report, {next(name for name in NAMES if check.name.startswith(name)): check for check in report.checks}


def fails(checks):
    return {name for name, check in checks.items() if check.passed is False}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sound_evaluation_passes_every_check(norm, caplog):
    attacks = SOUND if norm == "linf" else [PGD(e, "l2", steps=30) for e in (0.1, 0.5, 1.0)]
    with caplog.at_level(logging.WARNING):
        report, checks = checked(classifiers.mlp(), attacks, classifiers.images(), processor=classifiers.processor())
    assert set(checks) == set(NAMES) and len(report.checks) == len(NAMES)
    assert fails(checks) == set() and not report.failed_checks
    assert {name for name, check in checks.items() if check.passed is None} == set()
    assert "FAILED" not in caplog.text and "16 passed, 0 failed, 0 not applicable" in str(report)


def test_a_failed_check_is_warned_of_and_shown(caplog):
    with caplog.at_level(logging.WARNING):
        report, _ = checked(classifiers.pixel_mlp(scale=300.0))
    assert "margin loss finds no more (linf" in caplog.text and "Large logits saturate the cross entropy" in caplog.text
    assert "FAILED: margin loss finds no more" in str(report)


# ----------------------------------------------------------------------------------------------- of the model


class Wrapped(PixelModel):
    """The trained digits model, and something wrong with it."""

    def __init__(self):
        super().__init__(classifiers.mlp(), classifiers.MEAN, classifiers.STD)


class Softmax(Wrapped):
    def forward(self, pixels):
        return super().forward(pixels).softmax(1)


class Dropout(Wrapped):
    def forward(self, pixels):
        return super().forward(F.dropout(pixels, 0.3, training=True))


class Half(Wrapped):
    def forward(self, pixels):
        return super().forward(pixels).half()


class Quantised(Wrapped):
    """Shattered gradients: none passes the rounding."""

    def forward(self, pixels):
        return super().forward((pixels * 16).round() / 16)


class Counting(Wrapped):
    """Changes itself in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels):
        self.calls += 1
        return super().forward(pixels)


class NotFinite(Wrapped):
    def forward(self, pixels):
        logits = super().forward(pixels)
        return torch.where(logits == logits.amin(1, keepdim=True), -torch.inf, logits)


@pytest.mark.parametrize(
    ("model", "failing"),
    [
        (Softmax, "outputs are logits"),
        (Dropout, "logits are repeatable"),
        (NotFinite, "logits are repeatable"),
        (Half, "float32 in the attack"),
        (Counting, "the attacked model is the model"),
        (Quantised, "gradients are not zero"),
        (Quantised, "no gradient masking"),
        (Quantised, "nothing survives a huge ε"),
        (lambda: classifiers.pixel_mlp(scale=300.0), "margin loss finds no more"),
        (lambda: classifiers.pixel_mlp(scale=300.0), "gradients are not zero"),
        (lambda: classifiers.pixel_mlp(scale=300.0), "no gradient masking"),
    ],
)
def test_a_model_made_to_fail(model, failing):
    _, checks = checked(model())
    assert failing in fails(checks), checks


def test_another_normalisation_than_the_models_own():
    wrong = PixelModel(classifiers.mlp(), classifiers.MEAN, 1.2 * classifiers.STD)
    _, checks = checked(wrong, dataset=classifiers.images(), processor=classifiers.processor())
    assert fails(checks) == {"the attacked model is the model"}
    assert "logits differ by" in checks["the attacked model is the model"].found


@pytest.mark.parametrize("flat", [0.004, 0.996])
def test_pixels_that_are_all_black_or_white(flat):
    """As images of another range are when they are read as 8 bits."""
    pixels = (torch.rand(64, 1, 8, 8) < flat).float()
    _, checks = checked(classifiers.pixel_mlp(), dataset=torch.utils.data.TensorDataset(pixels, torch.arange(64) % 10))
    assert "pixels are spread as the processor expects" in fails(checks)


class Undecided(Wrapped):
    """Answers at random where nothing changes, as a defence that is drawn anew might."""

    def forward(self, pixels):
        logits = super().forward(pixels)
        return torch.where(torch.rand(len(logits), 1) < 0.2, -logits, logits)


def test_answers_at_random_change_at_epsilon_zero():
    _, checks = checked(Undecided())
    assert {"no change at ε = 0", "logits are repeatable"} <= fails(checks)


# ---------------------------------------------------------------------------------------------- of the attacks


@pytest.mark.parametrize(
    ("attack", "failing"),
    [
        (PGD(16 / 255, steps=20, step_size=1e-5), "no weaker than one step"),
        (PGD(16 / 255, steps=20, step_size=1e-5), "converged"),
        (PGD(16 / 255, steps=20, step_size=1e-5), "margin loss finds no more"),
        (PGD(16 / 255, steps=20, step_size=1e-5), "no gradient masking"),
    ],
)
def test_an_attack_that_is_badly_set(attack, failing):
    _, checks = checked(classifiers.pixel_mlp(), [attack])
    assert failing in fails(checks)
    assert not {"no change at ε = 0", "gradients are not zero", "nothing survives a huge ε"} & fails(checks)


class Wavy(nn.Module):
    """A loss with many local maxima: one step, and few, end in the wrong one."""

    def __init__(self):
        super().__init__()
        self.inner = classifiers.pixel_mlp()

    def forward(self, x):
        return self.inner(x) + 1.5 * (60 * x).sin().flatten(1).sum(1, keepdim=True) * torch.linspace(-1, 1, 10)


def test_too_few_steps_have_not_converged():
    _, checks = checked(Wavy(), [PGD(16 / 255, steps=1)])
    assert "converged" in fails(checks)


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
    """Right at exact 8-bit values only: what half a level changes, rounding mends."""

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


def test_checks_that_do_not_apply():
    report, checks = checked(classifiers.pixel_mlp(), [FGSM(0.1, clip=False)])
    assert checks["examples hold as 8-bit images"].passed is None
    assert "converged" not in checks  # a threat of its own, which no other attack has
    assert len(report.checks) == 9


def test_checks_can_be_quick_or_left_out():
    attacks = [PGD(16 / 255, steps=1, step_size=1e-5)]
    report, checks = checked(classifiers.pixel_mlp(), attacks, checks="quick")
    assert list(checks) == list(NAMES[: NAMES.index("converged")]) and report.settings["checks"] == "quick"
    assert fails(checks) == {"no weaker than one step"}
    assert checked(classifiers.pixel_mlp(), checks=False)[0].checks == []
