"""Which parameters of a converted model train."""

from torch import nn

from tests.conversion.conversions import QUERY_VALUE, convert, factored, in_layers
from tests.models import (
    bert,
)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_factors_and_their_biases_train():
    model = convert(bert(), target_modules=["query", "value"], trainable="factors")
    expected = {f"{name}.{p}" for name in in_layers(QUERY_VALUE) for p in ("U", "S", "V", "bias")}
    assert trainable(model) == expected


def test_saved_modules_train_beside_the_factors_and_stay_dense():
    model = convert(bert(), trainable="factors", modules_to_save=["classifier", "pooler"], target_modules="all-linear")
    assert type(model.classifier) is type(model.bert.pooler.dense) is nn.Linear
    dense = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trainable(model) == dense | {f"{name}.{p}" for name in factored(model) for p in ("U", "S", "V", "bias")}


def test_saved_modules_train_whatever_was_frozen_before():
    model = bert().requires_grad_(False)
    convert(model, modules_to_save=["classifier"], trainable="all")
    assert trainable(model) == {"classifier.weight", "classifier.bias"}


def test_factors_train_whatever_was_frozen_before():
    model = bert().requires_grad_(False)
    convert(model, target_modules=["query"], trainable="factors")
    assert trainable(model) == {f"{name}.{p}" for name in in_layers(QUERY_VALUE[:1]) for p in ("U", "S", "V", "bias")}
