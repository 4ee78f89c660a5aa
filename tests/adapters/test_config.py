"""`CondLRAdapterConfig`: values and rules; and PEFT, to which one method more is known."""

import json
import subprocess
import sys

import peft
import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hf_condlr import CondLRAdapterConfig, CondLRConfig
from hf_condlr.adapters.config import REFUSED
from hf_condlr.adapters.layer import CondLRLinear
from hf_condlr.adapters.registration import register_adapter
from hf_condlr.errors import ConfigError
from tests.adapters.tiny import adapted, base, trained
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer ≥ 1; received 0"),
        ({"r": True}, "r must be an integer ≥ 1; received True"),
        ({"r": 2.0}, "r must be an integer ≥ 1; received 2.0"),
        ({"tau": -0.1}, "tau must be a number ≥ 0 or 'inf'; received -0.1"),
        ({"tau": "large"}, "tau must be a number ≥ 0 or 'inf'; received 'large'"),
        ({"scale": 0}, "scale must be a finite number > 0; received 0"),
        ({"scale": float("inf")}, "scale must be a finite number > 0; received inf"),
        ({"scale": float("nan")}, "scale must be a finite number > 0; received nan"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must map names or regexes to integers"),
        ({"target_modules": []}, "target_modules must name layers"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform must come with a list"),
        ({"layers_pattern": "layers"}, "layers_pattern must come with layers_to_transform"),
        ({"peft_type": "LORA"}, "peft_type must be CONDLR_ADAPTER; received 'LORA'"),
    ],
)
def test_rules(options, message):
    with pytest.raises(ConfigError, match=message):
        CondLRAdapterConfig(**options)


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_lora_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"the options that apply to U S Vᵀ; received {name}="):
        CondLRAdapterConfig(**{name: 1})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        CondLRAdapterConfig(rank=3)


def test_the_same_after_json(tmp_path):
    config = CondLRAdapterConfig(r=3, tau=0.5, scale=2, target_modules={"b", "a"}, rank_pattern={"a": 2})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert CondLRAdapterConfig.from_pretrained(tmp_path) == config


def test_a_file_with_an_option_of_lora_is_refused(tmp_path):
    CondLRAdapterConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ConfigError, match="received use_dora=True"):
        PeftConfig.from_pretrained(tmp_path)


def test_the_config_of_compression_names_both_ways():
    with pytest.raises(ConfigError, match=r"get_robust_lowrank_model.*CondLRAdapterConfig"):
        get_peft_model(base(), CondLRConfig(r=2))


def test_registered_once():
    members = list(PeftType)
    register_adapter()
    assert list(PeftType) == members
    kind = PeftType("CONDLR_ADAPTER")
    assert kind is PeftType.CONDLR_ADAPTER is PeftType["CONDLR_ADAPTER"]
    assert kind == "CONDLR_ADAPTER"
    assert kind in members
    assert hash(kind) == hash("CONDLR_ADAPTER")
    assert PEFT_TYPE_TO_PREFIX_MAPPING["CONDLR_ADAPTER"] == "condlr_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["CONDLR_ADAPTER"](r=3) == CondLRAdapterConfig(r=3)
    assert PEFT_TYPE_TO_TUNER_MAPPING["CONDLR_ADAPTER"].tuner_layer_cls is CondLRLinear


@pytest.mark.processes
@pytest.mark.parametrize("first", ["import hf_condlr, peft", "import peft, hf_condlr"])
def test_peft_loads_an_adapter_after_the_import_of_this_package(first, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = adapted(type(base()).from_pretrained(tmp_path / "base"))
    trained(model).save_pretrained(tmp_path / "adapter")
    code = (
        f"import sys, {first.removeprefix('import ')}\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = peft.PeftModel.from_pretrained(model, sys.argv[1] + '/adapter')\n"
        "print(type(model.base_model).__name__, hf_condlr.is_factored(model))\n"
        "print(*[finder for finder in sys.meta_path if type(finder).__module__.startswith('hf_condlr')])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["CondLRAdapterModel", "True"], done.stderr


@pytest.mark.processes
def test_other_methods_are_not_disturbed():
    """What PEFT knows, in a process without this package, is known as it was."""
    code = (
        "import json, peft\nfrom peft import mapping as m\n"
        "tables = (m.PEFT_TYPE_TO_CONFIG_MAPPING, m.PEFT_TYPE_TO_TUNER_MAPPING, m.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)\n"
        "print(json.dumps([list(peft.PeftType), {k: v for k, v in m.PEFT_TYPE_TO_PREFIX_MAPPING.items()}, "
        "*({k: v.__name__ for k, v in t.items()} for t in tables)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    members, prefixes, configs, tuners, mixed = json.loads(done.stdout.splitlines()[-1])
    assert members == [x.value for x in PeftType if x != "CONDLR_ADAPTER"]

    def others(table):
        return {k.value: getattr(v, "__name__", v) for k, v in table.items() if k != "CONDLR_ADAPTER"}

    assert prefixes == others(PEFT_TYPE_TO_PREFIX_MAPPING)
    assert configs == others(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert tuners == others(PEFT_TYPE_TO_TUNER_MAPPING)
    assert mixed == others(peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
    assert LoraConfig(target_modules=["q_proj"]).peft_type is PeftType.LORA
