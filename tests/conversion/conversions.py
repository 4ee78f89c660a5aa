"""Conversions that many tests make, and what they compare."""

import pytest
import torch

from hf_condlr import CondLRConfig, LowRankConv2d, LowRankLinear, get_robust_lowrank_model
from tests.models import (
    MODELS,
)

LINEAR_MODELS = [pytest.param(case, id=name) for name, case in MODELS.items() if case.linear_layers]
ALL_MODELS = [pytest.param(case, id=name) for name, case in MODELS.items()]
EVERY_CONV = r".*(patch_embeddings\.projection|patch_embeddings|downsampling_layer\.1|convolution)"


def factored(model):
    """{name: layer} of the factored layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLinear, LowRankConv2d))}


def convert(model, **config):
    if not {"r", "rank_ratio", "compression_ratio"} & set(config):
        config["rank_ratio"] = 0.5
    return get_robust_lowrank_model(model, CondLRConfig(**config))


def lossless(model, **config):
    """Every target at full rank and without a bound: the model computes what it did."""
    return convert(model, rank_ratio=1.0, tau="inf", **config)


def assert_same(actual, expected, tolerance=1e-5):
    """Up to `tolerance` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def snapshot(model):
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, parameters, set(vars(model))


def assert_unchanged(model, before):
    modules, parameters, attributes = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    for (*_, now), (*_, then) in zip(parameters, before[1], strict=True):
        assert now.is_meta or torch.equal(now.nan_to_num(), then.nan_to_num())
    assert attributes == before[2]


def in_layers(names, layers=(0, 1)):
    return {f"bert.encoder.layer.{i}.{name}" for i in layers for name in names}


ATTENTION = [f"attention.self.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]
MLP = ["intermediate.dense", "output.dense"]
BODY = in_layers(ATTENTION + MLP) | {"bert.pooler.dense"}
QUERY_VALUE = ["attention.self.query", "attention.self.value"]
QUERY = "bert.encoder.layer.0.attention.self.query"
LAST_QUERY = "bert.encoder.layer.1.attention.self.query"
