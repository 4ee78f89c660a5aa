"""Checks of whole evaluations: their samples, models without gradients or in half precision, texts."""

import sys

import torch
from torch import nn

from hf_condlr.robustness.attacks import PGD, EmbeddingPGD
from hf_condlr.robustness.evaluation.checks import CheckBatch
from tests import classifiers, text_models
from tests.robustness.evaluation.evaluation import evaluate, reviews


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
    batches, module = [], sys.modules["hf_condlr.robustness.evaluation.run_checks"]
    monkeypatch.setattr(module, "CheckBatch", lambda p, *values: batches.append(p) or CheckBatch(p, *values))
    report = evaluate(dataset=data, checks=True, check_samples=30)
    assert report.settings["check_samples"] == 30 and len(batches[0]) == 30
    assert len({int(labels[order][p]) for p in batches[0]}) > 5


def test_text_evaluations_are_checked_too():
    model, tokenizer = text_models.trained_reviewer()
    strong = [EmbeddingPGD(0.15, steps=40, restarts=2)]
    report = evaluate(model, reviews(), strong, processor=tokenizer, checks=True, check_samples=16)
    assert [str(check) for check in report.failed_checks] == []
    assert "no gradient masking (embedding, ε = 0.15)" in {check.name for check in report.checks}
    weak = evaluate(model, reviews(), [EmbeddingPGD(0.6, steps=1)], processor=tokenizer, checks=True, check_samples=16)
    assert "converged (embedding, ε = 0.6)" in {check.name for check in weak.failed_checks}
