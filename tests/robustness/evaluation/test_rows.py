"""What is refused of a data set and of the arguments."""

import pytest
import torch
from datasets import DatasetDict

from hf_condlr import evaluate_robustness
from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.attacks import EmbeddingPGD
from hf_condlr.robustness.evaluation.rows import class_numbers
from tests import classifiers
from tests.robustness.evaluation.evaluation import ATTACKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": [EmbeddingPGD(0.1)]}, "attacks must take what the data set holds, tensors; .*pgd-embedding"),
        ({"batch_size": 0}, "batch_size must be ≥ 1; received 0"),
        ({"checks": "all"}, "checks must be True, False or 'quick'; received 'all'"),
        ({"check_samples": 0}, "check_samples must be ≥ 1"),
        ({"max_samples": 0}, "max_samples must be ≥ 1"),
        ({"save_examples": True}, "save_examples needs a folder"),
        ({"dataset": iter([])}, "a data set must have a length and rows by number; received list_iterator"),
        ({"dataset": []}, "the data set must hold at least one sample"),
        ({"dataset": [3]}, r"a row must be a dictionary or a pair \(pixels, label\); received int"),
        ({"dataset": [{"a": 1, "label": 0}]}, "rows must hold one image or one text, or the two"),
        ({"dataset": [{"text": "a"}]}, "must have a column of labels, labels, label, label_ids, or label_column"),
        ({"dataset": [(torch.zeros(1, 8, 8), 0.5)]}, "labels must be one class number a sample; received .*0.5"),
        ({"dataset": [(torch.zeros(1, 8, 8), -1)]}, "labels must be class numbers from 0; received -1"),
        ({"dataset": [(torch.zeros(1, 8, 8), "cat")]}, "labels must be one class number a sample; received .*cat"),
        ({"dataset": [(torch.zeros(1, 8, 8), None)]}, "labels must be one class number a sample; received .*None"),
        ({"dataset": [(torch.zeros(1, 8, 8), torch.eye(10)[3])]}, "labels must be one class number a sample"),
        ({"dataset": DatasetDict(test=classifiers.images(4))}, r"must be one split; received test. .*data\['test'\]"),
        ({"attacks": []}, "attacks must be at least one attack; received none"),
        ({"attacks": ["pgd-linf"]}, "attacks must be at least one attack; received 'pgd-linf'.*make_attacks"),
        ({"dataset": [(torch.zeros(1, 8, 8), 10)]}, "labels must be classes of the model, 0 to 9; received 10"),
        (
            {"dataset": classifiers.images(4), "image_column": "photo"},
            "a column that is named must exist; received photo",
        ),
    ],
)
def test_errors(options, message):
    arguments = {"model": classifiers.pixel_mlp(), "dataset": classifiers.Pairs(), "attacks": ATTACKS} | options
    with pytest.raises(EvaluationError, match=message):
        evaluate_robustness(**arguments)


def test_labels_of_two_classes_may_be_true_and_false():
    labels = class_numbers([{"label": True}, {"label": False}, {"label": True}], "label")
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 0, 1]
