"""The rank of each layer."""

import logging

import pytest
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.errors import ConfigError
from tests.conversion.conversions import LAST_QUERY, QUERY, assert_unchanged, convert, factored, snapshot
from tests.models import (
    LABELS,
    bert,
)

RANKS = {  # all layers but the classifier have min(m, n) = 16
    "r": ({"r": 3}, {3}),
    "largest r": ({"r": 16}, {16}),
    "ratio": ({"rank_ratio": 0.25}, {4}),
    "rounded up": ({"rank_ratio": 0.29}, {5}),
    "rounded down": ({"rank_ratio": 0.27}, {4}),
    "at least 1": ({"rank_ratio": 0.001}, {1}),
    "full": ({"rank_ratio": 1.0}, {16}),
    "full as an integer": ({"rank_ratio": 1}, {16}),
}


@pytest.mark.parametrize(("config", "ranks"), RANKS.values(), ids=RANKS)
def test_ranks(config, ranks):
    model = convert(bert(), **config)
    assert {layer.r for layer in factored(model).values()} == ranks
    assert {layer.r for layer in model.condlr.report.converted.values()} == ranks


def test_a_ratio_counts_from_each_layers_own_full_rank():
    model = convert(nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 40), nn.Linear(40, 4)), rank_ratio=0.5)
    assert [layer.r for layer in model] == [5, 5, 2]


PATTERNS = {
    "integer is a rank": ({"query": 1}, 1, 1, 4),
    "float is a ratio": ({"query": 1.0}, 16, 16, 4),
    "whole name": ({QUERY: 2}, 2, 4, 4),
    "regex": ({r"layer\.1\..*\.query": 2}, 4, 2, 4),
    "first match wins": ({r".*\.1\..*": 7, "query": 2, ".*": 3}, 2, 7, 3),
    "all": ({".*": 0.5}, 8, 8, 8),
    "no partial word": ({"uery": 2}, 4, 4, 4),
}


@pytest.mark.parametrize(("pattern", "query", "last_query", "other"), PATTERNS.values(), ids=PATTERNS)
def test_rank_patterns(pattern, query, last_query, other):
    layers = factored(convert(bert(), rank_ratio=0.25, rank_pattern=pattern))
    ranks = [layers[name].r for name in (QUERY, LAST_QUERY, "bert.encoder.layer.0.attention.self.key")]
    assert ranks == [query, last_query, other]


def test_a_rank_pattern_is_stronger_than_the_head_option():
    assert convert(bert(), head="full_rank", rank_pattern={"classifier": 3}).classifier.r == 3


@pytest.mark.parametrize(
    "config", [{"r": 17}, {"r": 2, "rank_pattern": {"query": 17}}, {"r": 6, "head": "low_rank"}], ids=str
)
def test_a_rank_that_no_layer_has_is_an_error_that_names_it(config):
    model = bert()
    before = snapshot(model)
    name, full = ("classifier", LABELS) if config.get("head") else (QUERY, 16)
    with pytest.raises(ConfigError, match=rf"rank of '{name}' is at most min\(in, out\) = {full}; received r="):
        convert(model, **config)
    assert_unchanged(model, before)


def test_one_warning_lists_the_layers_that_do_not_get_smaller(caplog):
    """32×8 has 256 weights, its factors 7·40 + 49 = 329 and 6·40 + 36 = 276; 100×100 breaks even above r = 41."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 100), nn.Linear(100, 100))
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        convert(model, r=4, rank_pattern={"0": 7, "1": 6, "3": 41})
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("factors are not smaller than the weight they replace in: 0, 1; compression_ratio")


def test_no_warning_where_all_layers_get_smaller(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        convert(nn.Sequential(nn.Linear(30, 40)), r=4)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("form", "r", "size"),
    [
        ("training", 20, 20 * 120 + 400),
        ("folded", 24, 24 * 120 + 576),
        ("pivoted", 33, 33 * 120 + 1089),
    ],
)
def test_the_ratio_counts_the_form_that_is_asked_for(form, r, size):
    """A square layer of 60: 0.8 · 3600 weights are r = 20 in training, r = 24 folded (24·120), 33 pivoted (33·87)."""
    report = convert(nn.Sequential(nn.Linear(60, 60)), compression_ratio=0.2, compression_form=form).condlr.report
    (layer,) = report.converted.values()
    assert (layer.r, layer.parameters, layer.folded_parameters) == (r, size, 120 * r)
    forms = f"{120 * r:,} once folded, {r * (120 - r):,} once pivoted"
    assert str(report) == f"1 layers converted, 3,600 weights became {size:,}, {forms}"


def test_a_form_without_a_ratio_is_refused():
    with pytest.raises(ConfigError, match="compression_form must be training without a compression_ratio"):
        CondLRConfig(r=2, compression_form="folded")


def test_ranks_from_a_ratio_are_multiples():
    """Of rank_multiple, rounded down; smaller ones, the full one and integers stay."""
    model = nn.ModuleDict({name: nn.Linear(60, 60) for name in ("a", "b", "c", "d")})
    config = CondLRConfig(
        rank_ratio=0.5,
        rank_multiple=8,
        rank_pattern={"b": 0.05, "c": 1.0, "d": 13},
        target_modules=["a", "b", "c", "d"],
    )
    get_robust_lowrank_model(model, config)
    assert [model[name].r for name in "abcd"] == [24, 3, 60, 13]
