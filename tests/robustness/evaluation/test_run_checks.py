"""All checks of an evaluation: a sound one passes them, others do not."""

import logging
import sys

import pytest
import torch
from torch import nn

from hf_condlr.robustness.attacks import FGSM, PGD, EmbeddingPGD
from hf_condlr.robustness.evaluation.attack_checks import CheckBatch
from tests import classifiers, text_models
from tests.robustness.evaluation.evaluation import NAMES, SOUND, checked, evaluate, fails, reviews


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


class Argmax(nn.Module):
    """Certain answers, no gradients."""

    def __init__(self):
        super().__init__()
        self.inner = classifiers.pixel_mlp()

    def forward(self, x):
        return torch.nn.functional.one_hot(self.inner(x).argmax(1), 10).float() * 9


def test_a_model_without_gradients_is_evaluated_and_found_out():
    report = evaluate(Argmax(), attacks=[PGD(32 / 255, steps=3)], checks=True, check_samples=64)
    failed = {check.name for check in report.failed_checks}
    assert "gradients are not zero (linf)" in failed and report.attacks[0].robust_accuracy > 0.8


def test_a_model_in_half_precision_is_found_out():
    report = evaluate(classifiers.pixel_mlp().bfloat16(), checks=True, check_samples=16)
    [check] = [check for check in report.failed_checks if check.name == "float32 in the attack"]
    assert "parameters in half precision" in check.found and "model.float()" in check.suspicion


def test_checks_draw_their_samples(monkeypatch):
    """Rows may come sorted by class."""
    pixels, labels = classifiers.held_out()
    order = labels.argsort(stable=True)
    data = torch.utils.data.TensorDataset(pixels[order], labels[order])
    batches, module = [], sys.modules["hf_condlr.robustness.evaluation.checks"]
    monkeypatch.setattr(module, "CheckBatch", lambda p, *values: batches.append(p) or CheckBatch(p, *values))
    report = evaluate(dataset=data, checks=True, check_samples=30)
    assert report.settings["check_samples"] == 30 and len(batches[0]) == 30
    assert len({int(labels[order][p]) for p in batches[0]}) > 5


def test_text_evaluations_are_checked_too():
    model, tokenizer = text_models.trained_reviewer()
    strong = [EmbeddingPGD(0.15, steps=40, restarts=2)]
    report = evaluate(model, reviews(), strong, processor=tokenizer, checks=True, check_samples=8)
    assert [str(check) for check in report.failed_checks] == []
    assert "no gradient masking (embedding, ε = 0.15)" in {check.name for check in report.checks}
    weak = evaluate(model, reviews(), [EmbeddingPGD(0.6, steps=1)], processor=tokenizer, checks=True, check_samples=16)
    assert "converged (embedding, ε = 0.6)" in {check.name for check in weak.failed_checks}
