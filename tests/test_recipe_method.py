"""What every recipe's model starts as, and which of its layers become what."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from .recipe_runs import METHODS, load
from .text_models import classifier


@pytest.fixture
def method():
    return load("method")


@pytest.mark.parametrize("name", METHODS)
def test_a_half_precision_file_is_trained_in_float32(method, tmp_path, name):
    classifier("Bert").bfloat16().save_pretrained(tmp_path)
    args = method.MethodArguments(str(tmp_path), method=name, rank_ratio=0.25)
    model = method.factored(method.dense_start(AutoModelForSequenceClassification, args, {}), args, list)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
