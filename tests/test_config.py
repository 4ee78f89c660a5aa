"""`CondLRConfig`: every field is checked where it is set, and a file says the same as the object it was saved from."""

import copy
import json
import math
import pickle
from dataclasses import fields

import peft
import pytest
import torch
from peft import PeftConfig

from hf_condlr import CondLRConfig
from hf_condlr.errors import ConfigError
from tests.models import bert

FILE = "condlr_config.json"


def strict_json(text):
    """Parse, and refuse the constants that Python writes and JSON does not know."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def save_and_load(config, folder):
    config.save_pretrained(folder)
    strict_json((folder / FILE).read_text(encoding="utf-8"))
    return CondLRConfig.from_pretrained(folder)


def write(folder, **values):
    (folder / FILE).write_text(json.dumps({"peft_type": "CONDLR", "r": 2, **values}), encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------- the contract


def test_defaults_are_those_of_the_contract():
    config = CondLRConfig(r=8)
    defaults = {
        "target_modules": "all-linear",
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "head": "dense",
        "r": 8,
        "rank_ratio": None,
        "compression_ratio": None,
        "rank_allocation": "uniform",
        "rank_multiple": 1,
        "rank_pattern": {},
        "tau": 0.1,
        "tau_pattern": {},
        "center": "nearest",
        "init_weights": "svd",
        "trainable": "all",
        "peft_type": "CONDLR",
    }
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_it_is_a_peft_config():
    assert isinstance(CondLRConfig(r=1), PeftConfig)


def test_every_option_is_explained_in_its_help():
    inherited = {f.name for f in fields(PeftConfig)} - {"peft_type"}
    own = [f for f in fields(CondLRConfig) if f.name not in inherited]
    assert len(own) >= 17
    assert [f.name for f in own if len(f.metadata.get("help", "")) < 10] == []


def test_two_configs_share_no_pattern():
    first, second = CondLRConfig(r=1), CondLRConfig(r=1)
    first.rank_pattern["query"] = 3
    first.tau_pattern["query"] = 0.5
    assert (second.rank_pattern, second.tau_pattern) == ({}, {})


def test_the_given_patterns_are_not_changed():
    given = {"query": "inf"}
    assert CondLRConfig(r=1, tau_pattern=given).tau_pattern == {"query": math.inf}
    assert given == {"query": "inf"}


# -------------------------------------------------------------------------------------------------- accepted values


@pytest.mark.parametrize("r", [1, 8, 10**6])
def test_r_takes_positive_integers(r):
    assert CondLRConfig(r=r).r == r


@pytest.mark.parametrize("ratio", [1e-6, 0.25, 1.0, 1])
def test_rank_ratio_takes_shares(ratio):
    assert CondLRConfig(rank_ratio=ratio).rank_ratio == ratio


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99])
def test_compression_ratio_takes_shares(ratio):
    assert CondLRConfig(compression_ratio=ratio).compression_ratio == ratio


@pytest.mark.parametrize(("given", "tau"), [(0, 0.0), (0.1, 0.1), (3, 3.0), ("inf", math.inf), (math.inf, math.inf)])
def test_tau_takes_numbers_and_inf(given, tau):
    config = CondLRConfig(r=1, tau=given, tau_pattern={"query": given})
    assert (config.tau, config.tau_pattern["query"]) == (tau, tau)
    assert isinstance(config.tau, float)
    assert isinstance(config.tau_pattern["query"], float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", "dense"),
        ("head", "full_rank"),
        ("head", "low_rank"),
        ("center", "nearest"),
        ("center", "rms"),
        ("center", "mean"),
        ("init_weights", "svd"),
        ("init_weights", "randomized_svd"),
        ("init_weights", "activation_aware"),
        ("init_weights", "orthogonal"),
        ("trainable", "all"),
        ("trainable", "factors"),
    ],
)
def test_choices_are_taken(name, value):
    assert getattr(CondLRConfig(r=1, **{name: value}), name) == value


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_rank_allocation_spreads_a_compression_ratio(allocation):
    assert CondLRConfig(compression_ratio=0.5, rank_allocation=allocation).rank_allocation == allocation


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_is_recognised_in_any_case_as_in_peft(spelling):
    assert CondLRConfig(r=1, target_modules=spelling).target_modules == "all-linear"


@pytest.mark.parametrize("given", [{"value", "query"}, ("value", "query"), ["query", "value"]])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_may_come_in_any_collection(name, given, tmp_path):
    config = CondLRConfig(r=1, **{name: given})
    value = getattr(config, name)
    assert isinstance(value, list)
    assert sorted(value) == ["query", "value"]
    assert save_and_load(config, tmp_path) == config


@pytest.mark.parametrize("given", [(0, 2), [0, 2], {0, 2}, range(0, 4, 2)])
def test_layers_to_transform_may_come_in_any_collection(given, tmp_path):
    config = CondLRConfig(r=1, target_modules=["query"], layers_to_transform=given)
    assert sorted(config.layers_to_transform) == [0, 2]
    assert save_and_load(config, tmp_path) == config


# --------------------------------------------------------------------------------------------------- refused values

INVALID = [  # keyword arguments, what the message says of the rule, and of the value
    ({}, "exactly one of r, rank_ratio, compression_ratio", "none of them"),
    ({"r": 2, "rank_ratio": 0.5}, "exactly one of", r"r=2 and rank_ratio=0\.5"),
    ({"r": 2, "compression_ratio": 0.5}, "exactly one of", r"r=2 and compression_ratio=0\.5"),
    ({"rank_ratio": 0.3, "compression_ratio": 0.5}, "exactly one of", r"rank_ratio=0\.3 and compression_ratio=0\.5"),
    ({"r": 0}, "r must be an integer ≥ 1", "0"),
    ({"r": -3}, "r must be an integer ≥ 1", "-3"),
    ({"r": 2.0}, "r must be an integer ≥ 1", r"2\.0"),
    ({"r": True}, "r must be an integer ≥ 1", "True"),
    ({"r": "8"}, "r must be an integer ≥ 1", "'8'"),
    ({"rank_ratio": 0}, r"rank_ratio must lie in \(0, 1\]", "0"),
    ({"rank_ratio": 1.01}, r"rank_ratio must lie in \(0, 1\]", r"1\.01"),
    ({"rank_ratio": -0.5}, r"rank_ratio must lie in \(0, 1\]", r"-0\.5"),
    ({"rank_ratio": math.nan}, r"rank_ratio must lie in \(0, 1\]", "nan"),
    ({"rank_ratio": True}, r"rank_ratio must lie in \(0, 1\]", "True"),
    ({"rank_ratio": "0.5"}, r"rank_ratio must lie in \(0, 1\]", r"'0\.5'"),
    ({"compression_ratio": 0.0}, r"compression_ratio must lie in \(0, 1\)", r"0\.0"),
    ({"compression_ratio": 1.0}, r"compression_ratio must lie in \(0, 1\)", r"1\.0"),
    ({"compression_ratio": math.nan}, r"compression_ratio must lie in \(0, 1\)", "nan"),
    ({"compression_ratio": "half"}, r"compression_ratio must lie in \(0, 1\)", "'half'"),
    ({"compression_ratio": 0.5, "rank_multiple": 0}, "rank_multiple must be an integer ≥ 1", "0"),
    ({"compression_ratio": 0.5, "rank_multiple": 8.0}, "rank_multiple must be an integer ≥ 1", "8.0"),
    ({"r": 16, "rank_multiple": 8}, "rank_multiple must be 1 with r=16", "8"),
    ({"r": 2, "rank_allocation": "energy"}, "rank_allocation must be uniform without a compression_ratio", "energy"),
    ({"rank_ratio": 0.5, "rank_allocation": "energy"}, "must be uniform without a compression_ratio", "energy"),
    ({"r": 2, "rank_allocation": "greedy"}, "rank_allocation must be one of uniform, energy", "'greedy'"),
    ({"compression_ratio": 0.5, "rank_allocation": "greedy"}, "rank_allocation must be one of", "'greedy'"),
    ({"r": 2, "rank_pattern": {"q": 0}}, "rank_pattern values must be integers ≥ 1", "'q': 0"),
    ({"r": 2, "rank_pattern": {"q": 1.5}}, "rank_pattern values must be integers ≥ 1", r"'q': 1\.5"),
    ({"r": 2, "rank_pattern": {"q": 0.0}}, "rank_pattern values must be integers ≥ 1", r"'q': 0\.0"),
    ({"r": 2, "rank_pattern": {"q": True}}, "rank_pattern values must be integers ≥ 1", "'q': True"),
    ({"r": 2, "rank_pattern": {"q": math.nan}}, "rank_pattern values must be integers ≥ 1", "'q': nan"),
    ({"r": 2, "rank_pattern": {"q": "4"}}, "rank_pattern values must be integers ≥ 1", "'q': '4'"),
    ({"r": 2, "rank_pattern": {"q(": 4}}, "rank_pattern must hold valid regexes", r"'q\('"),
    ({"r": 2, "rank_pattern": {3: 4}}, "rank_pattern", "3"),
    ({"r": 2, "rank_pattern": None}, "rank_pattern", "None"),
    ({"r": 2, "rank_pattern": ["q"]}, "rank_pattern", r"\['q'\]"),
    ({"r": 2, "tau": -0.1}, "tau must be a number ≥ 0 or 'inf'", r"-0\.1"),
    ({"r": 2, "tau": math.nan}, "tau must be a number ≥ 0 or 'inf'", "nan"),
    ({"r": 2, "tau": -math.inf}, "tau must be a number ≥ 0 or 'inf'", "-inf"),
    ({"r": 2, "tau": "infinite"}, "tau must be a number ≥ 0 or 'inf'", "'infinite'"),
    ({"r": 2, "tau": None}, "tau must be a number ≥ 0 or 'inf'", "None"),
    ({"r": 2, "tau": True}, "tau must be a number ≥ 0 or 'inf'", "True"),
    ({"r": 2, "tau_pattern": {"q": -1}}, r"tau_pattern\['q'\] must be a number ≥ 0 or 'inf'", "-1"),
    ({"r": 2, "tau_pattern": {"q": None}}, r"tau_pattern\['q'\] must be a number ≥ 0 or 'inf'", "None"),
    ({"r": 2, "tau_pattern": {"q(": 1}}, "tau_pattern must hold valid regexes", r"'q\('"),
    ({"r": 2, "tau_pattern": {3: 1}}, "tau_pattern", "3"),
    ({"r": 2, "tau_pattern": None}, "tau_pattern", "None"),
    ({"r": 2, "tau_pattern": ["q"]}, "tau_pattern", r"\['q'\]"),
    ({"r": 2, "head": "none"}, "head must be one of dense, full_rank, low_rank", "'none'"),
    ({"r": 2, "head": None}, "head must be one of dense, full_rank, low_rank", "None"),
    ({"r": 2, "center": "median"}, "center must be one of nearest, rms, mean", "'median'"),
    ({"r": 2, "init_weights": "pissa"}, "init_weights must be one of svd, randomized_svd", "'pissa'"),
    ({"r": 2, "init_weights": True}, "init_weights must be one of svd, randomized_svd", "True"),
    ({"r": 2, "trainable": "none"}, "trainable must be one of all, factors", "'none'"),
    ({"r": 2, "target_modules": []}, "target_modules must name at least one module", r"\[\]"),
    ({"r": 2, "target_modules": ""}, "target_modules must name at least one module", "''"),
    ({"r": 2, "target_modules": None}, "target_modules must name at least one module", "None"),
    ({"r": 2, "target_modules": "q("}, "target_modules must hold valid regexes", r"'q\('"),
    ({"r": 2, "target_modules": 3}, "target_modules", "3"),
    ({"r": 2, "target_modules": ["q", 1]}, "target_modules", "1"),
    ({"r": 2, "exclude_modules": "q("}, "exclude_modules must hold valid regexes", r"'q\('"),
    ({"r": 2, "exclude_modules": 3}, "exclude_modules", "3"),
    ({"r": 2, "exclude_modules": ["q", 1]}, "exclude_modules", "1"),
    ({"r": 2, "modules_to_save": "classifier"}, "modules_to_save", "'classifier'"),  # read letter by letter otherwise
    ({"r": 2, "modules_to_save": [1]}, "modules_to_save", "1"),
    ({"r": 2, "modules_to_save": ["q("]}, "modules_to_save must hold valid regexes", r"'q\('"),
    ({"r": 2, "layers_to_transform": 1}, "target_modules must be a list .* with layers_to_transform", "'all-linear'"),
    ({"r": 2, "target_modules": ".*query", "layers_to_transform": [1]}, "with layers_to_transform", "query"),
    ({"r": 2, "target_modules": ["q"], "layers_to_transform": "0"}, "layers_to_transform", "'0'"),
    ({"r": 2, "target_modules": ["q"], "layers_to_transform": [0.5]}, "layers_to_transform", r"0\.5"),
    ({"r": 2, "target_modules": ["q"], "layers_to_transform": -1}, "layers_to_transform", "-1"),
    ({"r": 2, "target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern .* layers_to_transform", "'h'"),
    ({"r": 2, "peft_type": "LORA"}, "peft_type must be CONDLR", "'LORA'"),
    ({"r": 2, "peft_type": None}, "peft_type must be CONDLR", "None"),
]


@pytest.mark.parametrize(("arguments", "rule", "value"), INVALID, ids=lambda x: str(x)[:60] if x else "nothing")
def test_contradictions_are_refused(arguments, rule, value):
    with pytest.raises(ConfigError, match=rf"{rule}.*; received .*{value}.*\. \S") as caught:
        CondLRConfig(**arguments)
    assert isinstance(caught.value, ValueError)
    assert caught.value.remedy


def test_an_error_survives_pickling():
    with pytest.raises(ConfigError) as caught:
        CondLRConfig(r=0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (ConfigError, str(caught.value))


# -------------------------------------------------------------------------------------------------- files and copies

CONFIGS = [
    {"r": 8},
    {"rank_ratio": 0.25, "tau": 0},
    {"rank_ratio": 1, "tau": "inf", "center": "rms"},
    {"compression_ratio": 0.5, "rank_allocation": "energy", "init_weights": "activation_aware", "rank_multiple": 8},
    {"r": 2, "tau": math.inf, "tau_pattern": {r".*\.query": "inf", "value": 0.5, "key": 0}},
    {"r": 2, "rank_pattern": {"query": 1, "value": 1.0, r"layer\.\d+\.key": 0.125}},
    {"r": 2, "target_modules": r".*\.(query|value)", "exclude_modules": r".*\.0\..*"},
    {"r": 2, "target_modules": ["query"], "layers_to_transform": [0, 3], "layers_pattern": "layer"},
    {"r": 2, "target_modules": ["query"], "layers_to_transform": 1, "layers_pattern": ["layer", "h"]},
    {"r": 2, "modules_to_save": ["classifier"], "trainable": "factors", "head": "full_rank"},
    {"r": 2, "exclude_modules": ["pooler"], "head": "low_rank", "init_weights": "orthogonal", "center": "mean"},
    {"r": 2, "task_type": "SEQ_CLS", "base_model_name_or_path": "me/é", "revision": "main"},
]


@pytest.mark.parametrize("arguments", CONFIGS, ids=str)
def test_the_file_is_strict_json_and_loads_equal(arguments, tmp_path):
    config = CondLRConfig(**arguments)
    loaded = save_and_load(config, tmp_path)
    assert type(loaded) is CondLRConfig
    assert loaded == config
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("arguments", CONFIGS, ids=str)
def test_to_dict_is_strict_json_and_builds_an_equal_config(arguments):
    config = CondLRConfig(**arguments)
    assert CondLRConfig(**strict_json(json.dumps(config.to_dict()))) == config


def test_a_second_save_writes_the_same_file(tmp_path):
    config = CondLRConfig(r=2, tau="inf", target_modules={"b", "a", "c"}, rank_pattern={"a": 1.0})
    first, second = tmp_path / "first", tmp_path / "second"
    config.save_pretrained(first)
    CondLRConfig.from_pretrained(first).save_pretrained(second)
    assert (first / FILE).read_bytes() == (second / FILE).read_bytes()


def test_a_rank_and_a_ratio_of_one_stay_apart_in_the_file(tmp_path):
    loaded = save_and_load(CondLRConfig(r=2, rank_pattern={"query": 1, "value": 1.0}), tmp_path)
    assert [type(value) for value in loaded.rank_pattern.values()] == [int, float]


def test_the_order_of_a_pattern_survives_the_file(tmp_path):
    """The first match wins, so that "b.*" before "a.*" is another config than the reverse."""
    config = CondLRConfig(r=2, rank_pattern={"b.*": 1, "a.*": 2, ".*": 3}, tau_pattern={"z": 1, "y": 2})
    loaded = save_and_load(config, tmp_path)
    assert list(loaded.rank_pattern) == ["b.*", "a.*", ".*"]
    assert list(loaded.tau_pattern) == ["z", "y"]


def test_an_infinite_tau_is_a_word_in_the_file(tmp_path):
    CondLRConfig(r=2, tau=math.inf, tau_pattern={"query": math.inf}).save_pretrained(tmp_path)
    saved = strict_json((tmp_path / FILE).read_text(encoding="utf-8"))
    assert (saved["tau"], saved["tau_pattern"]) == ("inf", {"query": "inf"})


def test_an_unknown_field_in_the_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"its fields only; received unknown lora_alpha, zeta\. Remove them"):
        CondLRConfig.from_pretrained(write(tmp_path, zeta=1, lora_alpha=16))


def test_a_wrong_value_in_the_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"tau must be a number ≥ 0 or 'inf'; received -1"):
        CondLRConfig.from_pretrained(write(tmp_path, tau=-1))


def test_an_adapter_of_peft_beside_it_does_not_disturb(tmp_path):
    peft.LoraConfig(r=4, target_modules=["query"]).save_pretrained(tmp_path)
    config = CondLRConfig(r=2)
    assert save_and_load(config, tmp_path) == config


def test_a_file_of_another_method_with_known_fields_only_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"peft_type must be CONDLR; received 'LORA'"):
        CondLRConfig.from_pretrained(write(tmp_path, peft_type="LORA"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"must have a condlr_config\.json; received .*nothing"):
        CondLRConfig.from_pretrained(tmp_path / "nothing")


def test_a_model_saved_beside_the_config_loads_as_any_other(tmp_path):
    """transformers takes a folder with `adapter_config.json` for an adapter of PEFT."""
    CondLRConfig(r=2).save_pretrained(tmp_path)
    model = bert()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_peft_names_the_function_that_uses_the_config():
    with pytest.raises(ConfigError, match=r"no PEFT adapter; .*get_robust_lowrank_model"):
        peft.get_peft_model(bert(), CondLRConfig(r=2))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(duplicate):
    config = CondLRConfig(r=2, tau="inf", tau_pattern={"query": 0.3}, target_modules=["query", "value"])
    assert duplicate(config) == config
