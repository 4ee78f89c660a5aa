"""What every recipe's model starts as, and which of its layers become what."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_condlr import CondLRTrainingArguments
from hf_condlr.layers import factored_layers
from tests.recipes.recipe_runs import METHODS, load
from tests.text_models import classifier


@pytest.fixture
def method():
    return load("method")


@pytest.mark.parametrize("name", METHODS)
def test_a_half_precision_file_is_trained_in_float32(method, tmp_path, name):
    classifier("Bert").bfloat16().save_pretrained(tmp_path)
    args = method.MethodArguments(str(tmp_path), method=name, rank_ratio=0.25)
    model = method.factored(method.dense_start(AutoModelForSequenceClassification, args, {}), args, list)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_excluded_modules_stay_dense(method):
    args = method.MethodArguments(model_type="bert", rank_ratio=0.25, exclude_modules=r".*layer\.0\..*")
    model = method.factored(copy.deepcopy(classifier("Bert")), args, list)
    assert set(factored_layers(model)) and not any(".layer.0." in name for name in factored_layers(model))
    with pytest.raises(ValueError, match="exclude_modules must hold valid regexes"):
        method.MethodArguments(model_type="bert", exclude_modules="(")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"method": "dense", "tau": 0.2, "init_weights": "orthogonal", "rank_ratio": 0.5},
            "rank_ratio, init_weights, tau",
        ),
        ({"method": "dense", "compression_ratio": 0.4}, "compression_ratio"),
        ({"method": "lowrank", "tau": 0.2, "compression_ratio": 0.4}, "tau"),
        ({"method": "lowrank", "tau": 0.2, "conditioned_start": True}, None),
        ({"method": "dense"}, None),
        ({"method": "condlr", "tau": 0.2}, None),
    ],
)
def test_options_of_the_conversion_that_a_method_does_not_have_are_said(method, tmp_path, caplog, options, said):
    training = CondLRTrainingArguments(str(tmp_path), use_cpu=True)
    method.say_ignored(method.MethodArguments(model_type="bert", **options), training)
    messages = [f"method {options['method']} takes no notice of {said}"] if said else []
    assert [record.getMessage() for record in caplog.records if record.name == "method"] == messages
