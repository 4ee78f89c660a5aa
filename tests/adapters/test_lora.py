"""`to_lora`: the same outputs, and files that PEFT loads without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from hf_condlr import CondLRAdapterConfig, is_factored, to_lora
from hf_condlr.errors import ConversionError
from tests.adapters.tiny import ARCHITECTURES, adapted, base, outputs, trained
from tests.paths import ROOT

TOLERANCE = 1e-5  # float32 logits of size 1; measured: 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_outputs_stay(name, tmp_path):
    model = trained(adapted(base(name), scale=2.0, rank_pattern={"[qv](_proj)?|query|c_attn": 3}), name)
    before = outputs(model, name)
    lora = to_lora(model)
    assert not is_factored(lora)
    assert (outputs(lora, name) - before).abs().max() < TOLERANCE
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.equal(outputs(loaded, name), outputs(lora, name))
    assert (outputs(loaded.merge_and_unload(), name) - before).abs().max() < TOLERANCE


def test_the_matrices():
    """B = s U S and A = Vᵀ, so that B A = s U S Vᵀ, at LoRA's scale 1: float64 by NumPy."""
    model = trained(adapted(scale=0.5, rank_pattern={"v_proj": 1}))
    update = model.base_model.model.model.layers[0].self_attn.v_proj.condlr_factors["default"]
    U, S, V = (p.detach().double().numpy().copy() for p in (update.U, update.S, update.V))
    layers = {name: x for name, x in to_lora(model).named_modules() if isinstance(x, LoraLayer)}
    assert {scale for layer in layers.values() for scale in layer.scaling.values()} == {1.0}
    layer = layers["base_model.model.model.layers.0.self_attn.v_proj"]
    A, B = (x["default"].weight.detach().double().numpy() for x in (layer.lora_A, layer.lora_B))
    assert A.shape == (1, 16)
    np.testing.assert_allclose(B @ A, 0.5 * U @ S @ V.T, rtol=0, atol=1e-7)


def test_the_config(tmp_path):
    """Short names as servers expect them, lora_alpha = r; the base and the task are those of the adapter."""
    base().save_pretrained(tmp_path / "base")
    model = type(base()).from_pretrained(tmp_path / "base")
    model = adapted(model, r=2, task_type="CAUSAL_LM", target_modules=r".*\.(q|v)_proj", rank_pattern={"v_proj": 1})
    to_lora(model).save_pretrained(tmp_path / "lora")
    stored = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["task_type"]) == (2, 2, "CAUSAL_LM")
    assert sorted(stored["target_modules"]) == ["q_proj", "v_proj"]
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    names = {f"model.layers.{i}.self_attn.v_proj": 1 for i in (0, 1)}
    assert stored["rank_pattern"] == stored["alpha_pattern"] == names


def test_full_names_where_short_ones_match_others():
    model = adapted(target_modules=["layers.0.self_attn.q_proj"])
    assert to_lora(model).peft_config["default"].target_modules == {"model.layers.0.self_attn.q_proj"}


def test_modules_to_save_go_with_it_and_other_adapters_do_not(tmp_path):
    model = adapted(base("bert"), adapter="first", target_modules=["query"], modules_to_save=["classifier"])
    trained(model, "bert")
    before = outputs(model, "bert")
    model.add_adapter("second", CondLRAdapterConfig(r=1, target_modules=["key"]))
    lora = to_lora(model, "first")
    assert (outputs(lora, "bert") - before).abs().max() < TOLERANCE
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("bert"), tmp_path / "first")
    assert (outputs(loaded, "bert") - before).abs().max() < TOLERANCE
    assert list(lora.peft_config) == ["first"]


@pytest.mark.processes
def test_peft_loads_it_without_this_package(tmp_path):
    model = trained(adapted())
    save_file({"y": outputs(model)}, tmp_path / "expected.safetensors")
    base().save_pretrained(tmp_path / "base")
    to_lora(model).save_pretrained(tmp_path / "lora")
    code = (
        "import sys; sys.modules['hf_condlr'] = None\n"
        "import torch; from peft import PeftModel; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder + '/base')\n"
        "model = PeftModel.from_pretrained(model, folder + '/lora').eval()\n"
        "inputs = {k: torch.tensor(v) for k, v in __import__('json').loads(sys.argv[2]).items()}\n"
        "with torch.no_grad(): save_file({'y': model(**inputs).logits}, folder + '/found.safetensors')\n"
        "try: import hf_condlr\nexcept ImportError: print('blocked')\n"
    )
    torch.manual_seed(0)
    from tests.models import MODELS

    inputs = json.dumps({k: v.tolist() for k, v in MODELS["llama"].inputs().items()})
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), inputs], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "blocked" in done.stdout, done.stderr
    expected, found = (load_file(tmp_path / f"{name}.safetensors")["y"] for name in ("expected", "found"))
    assert (expected - found).abs().max() < TOLERANCE


def test_what_is_no_adapter_is_refused():
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    for model, name in ((base(), "default"), (lora, "default"), (adapted(), "other")):
        with pytest.raises(ConversionError, match="to_lora needs a PeftModel with this adapter"):
            to_lora(model, name)


def test_merged_weights_are_refused():
    model = trained(adapted())
    model.merge_adapter()
    with pytest.raises(ConversionError, match=r"those without an adapter.*Call model.unmerge_adapter\(\) first"):
        to_lora(model)
