"""Classes of a model and a data set are matched by their names."""

import logging

import pytest
import torch
from datasets import ClassLabel

from hf_condlr import evaluate_robustness
from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.attacks import FGSM
from hf_condlr.robustness.evaluation.rows import match_classes
from tests import classifiers


def named(names):
    """A model whose classes have these names."""
    config = type("Config", (), {"id2label": dict(enumerate(names))})()
    return type("Model", (), {"config": config})()


def data(names):
    return type("Data", (), {"features": {"label": ClassLabel(names=names)}})()


@pytest.mark.parametrize(
    ("model", "names", "matched"),
    [
        (["cat", "dog"], ["cat", "dog"], None),
        (["Dog", "sea_lion", "CAT"], ["cat", "dog", "sea lion"], [2, 0, 1]),
        (["tench", "goldfish", "shark"], ["shark", "tench"], [2, 0]),  # a part of the model's classes
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], None),
        (["NEGATIVE", "POSITIVE"], ["neg", "pos"], None),
    ],
)
def test_names_are_matched(model, names, matched):
    assert match_classes(named(model), data(names), "label") == matched


def test_classes_that_cannot_be_matched_are_shown():
    with pytest.raises(EvaluationError, match="received dog, cat for the model, cat, dog, bird for the data set"):
        match_classes(named(["dog", "cat"]), data(["cat", "dog", "bird"]), "label")


def test_a_model_with_its_classes_in_another_order_has_its_own_accuracy(caplog):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    images, options = classifiers.images(60), {"processor": classifiers.processor(), "checks": False}
    images = images.cast_column("label", ClassLabel(names=[f"digit {i}" for i in range(10)]))
    expected = evaluate_robustness(classifiers.mlp(), images, [FGSM(0.05)], **options)
    model = classifiers.mlp()
    last = model.layers[-1]
    last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]
    model.config.id2label = {i: f"Digit_{digit}" for i, digit in enumerate(order)}
    with caplog.at_level(logging.WARNING):
        report = evaluate_robustness(model, images, [FGSM(0.05)], **options)
    assert "matched by their names" in caplog.text
    assert report.correct == expected.correct and report.clean_accuracy > 0.8
    assert report.attacks[0].survived == expected.attacks[0].survived
    assert report.labels == expected.labels
    assert report.settings["samples_digest"] == expected.settings["samples_digest"]
    assert report.model != expected.model  # two models of one origin
