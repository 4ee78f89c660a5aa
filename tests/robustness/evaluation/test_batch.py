"""One batch under attack: rounding to 8 bits."""

import pytest
import torch

from hf_condlr.robustness.attacks import FGSM, PGD
from tests import classifiers
from tests.robustness.evaluation.evaluation import evaluate


def test_rounding_to_eight_bits_is_measured():
    """The test digits are exact in 8 bits: a step of less than half a level is rounded away."""
    report = evaluate(classifiers.pixel_mlp(), attacks=[FGSM(0.4 / 255), FGSM(51 / 255)])
    small, large = report.attacks
    assert small.rounded_accuracy == report.clean_accuracy > small.robust_accuracy - 1e-9
    assert large.rounded_accuracy == pytest.approx(large.robust_accuracy, abs=0.01)


def test_samples_that_rounding_corrects_are_attacked_once_more_without_stopping():
    """PGD that stops at the border leaves examples that rounding corrects; the report takes further steps."""
    attack = PGD(16 / 255, steps=100, step_size=0.2 / 255)  # small steps, which end close behind the border
    report = evaluate(attacks=[attack], batch_size=200)
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    index = torch.tensor(report.correct).nonzero()[:, 0]
    stopped = attack.reseeded(0)(model, pixels[index], labels[index])
    naive = (model((stopped * 255).round() / 255).argmax(1) == labels[index]).sum().item() / 200
    [result] = report.attacks
    assert result.robust_accuracy <= result.rounded_accuracy < naive - 0.02  # measured: 0.74, 0.74, 0.765
    assert result.rounded_accuracy - result.robust_accuracy <= 0.01


def test_rounding_is_measured_in_batches_without_a_correct_sample_too():
    report = evaluate(batch_size=1, max_samples=40, attacks=[FGSM(0.4 / 255)])
    assert report.clean_accuracy < 1 and report.attacks[0].rounded_accuracy == report.clean_accuracy
