"""LoRA on compressed models, through PEFT's own calls: against W + s B A multiplied out in float64."""

import copy
import math
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_condlr import attach_manifold_step, condition_report, fold_model, to_dense_model
from hf_condlr.adapters.lora_on_factors import LoraOnFactors
from hf_condlr.errors import ConversionError
from hf_condlr.layers import FoldedLayer, LowRankLinear, PivotedLayer, compressed_layers, factored_layers
from tests.conversion.conversions import assert_same, convert
from tests.manifold.nets import assert_guarantee
from tests.models import MODELS, bert, gpt2, resnet, transformers_adapters
from tests.paths import ROOT

FORMS = {"factored": LowRankLinear, "folded": FoldedLayer, "pivoted": PivotedLayer}
INPUTS = MODELS["bert"].inputs()


def small_bert(form, **options):
    model = convert(bert(), rank_ratio=0.4, tau=0.1, conditioned_start=True, **options)
    return model if form == "factored" else fold_model(model, form)


def drawn(model, seed=1):
    """Every B gets values; they start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def dense_weight(layer):
    return layer.to_dense().weight.detach().double().numpy()


@pytest.mark.parametrize("form", FORMS)
def test_the_update_is_that_of_lora(form):
    model = small_bert(form)
    before, expected = logits(model), to_dense_model(copy.deepcopy(model))
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"]))
    assert torch.equal(logits(adapted), before)  # B starts at zero
    drawn(adapted)
    with torch.no_grad():
        for name, module in adapted.get_base_model().named_modules():
            if isinstance(module, LoraOnFactors):
                A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
                expected.get_submodule(name).weight += (2 * B @ A).float()
    assert (logits(adapted) - before).abs().max() > 0.1
    assert_same(logits(adapted), logits(expected))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_linear_is_every_layer_but_the_head(form, task):
    model = small_bert(form)
    layers = set(compressed_layers(model))
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=task))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraOnFactors)}
    assert adapted == layers
    others = {name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)} - adapted
    assert others == (set() if task else {"classifier"})  # as for a dense model without a task


def test_all_linear_leaves_factored_output_embeddings_alone():
    model = convert(gpt2(tie_word_embeddings=False), head="low_rank")
    assert isinstance(model.lm_head, LowRankLinear)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model.lm_head, LowRankLinear)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_adapter_trains_and_it_learns(form):
    model = small_bert(form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    adapted.train()
    for _ in range(8):
        loss = adapted(**INPUTS, labels=torch.arange(len(INPUTS["input_ids"])) % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(p, after[name]) for name, p in before.items() if not name.startswith("classifier"))


@pytest.mark.parametrize("form", FORMS)
def test_adapters_are_saved_and_loaded_by_peft(form, tmp_path):
    adapted = drawn(get_peft_model(small_bert(form), LoraConfig(r=2, target_modules="all-linear")))
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(small_bert(form), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(adapted))


@transformers_adapters
def test_a_model_that_was_saved_and_loaded_takes_adapters(tmp_path):
    model = small_bert("factored")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    assert_same(logits(loaded), logits(model))
    assert sum(isinstance(m, LoraOnFactors) for m in loaded.modules()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_merging_makes_layers_of_a_higher_rank_that_compute_the_same(form, dtype):
    model = small_bert(form).to(dtype)
    ranks = {name: layer.r for name, layer in compressed_layers(model).items()}
    options = {"lora_bias": True, "use_rslora": True}
    adapted = drawn(get_peft_model(model, LoraConfig(r=3, target_modules=["query", "dense"], **options)))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraOnFactors)}
    weights = {
        name: dense_weight(m.base_layer) + m.get_delta_weight("default").detach().double().numpy()
        for name, m in layers.items()
    }
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    tolerance = (50 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    assert merged is model and weights
    for name, W in weights.items():
        layer = merged.get_submodule(name)
        assert isinstance(layer, FORMS[form])
        assert ranks[name] < layer.r <= ranks[name] + 3
        assert np.linalg.norm(dense_weight(layer) - W) <= tolerance * np.linalg.norm(W)
        assert not any(p.requires_grad for p in layer.parameters() if p is not layer.bias)
    if dtype != torch.bfloat16:
        assert_same(logits(merged), expected)


def test_what_was_merged_is_saved_and_its_condition_is_reported(tmp_path):
    model = small_bert("factored")
    merged = drawn(get_peft_model(model, LoraConfig(r=3, target_modules=["query"]))).merge_and_unload()
    for name, layer in factored_layers(merged).items():
        assert layer.bound == (math.inf if name.endswith("query") else 1.1)
    assert condition_report(merged).max_orthonormality_error < 1e-5
    merged.save_pretrained(tmp_path)
    assert_same(logits(type(merged).from_pretrained(tmp_path)), logits(merged))


def test_an_adapter_that_did_nothing_merges_into_the_same_rank():
    model = small_bert("factored")
    ranks = {name: layer.r for name, layer in factored_layers(model).items()}
    merged = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS")).merge_and_unload()
    assert {name: layer.r for name, layer in factored_layers(merged).items()} == ranks


def test_merging_at_full_rank_keeps_full_rank():
    model = convert(bert(), rank_ratio=1.0, tau="inf")
    adapted = drawn(get_peft_model(model, LoraConfig(r=3, target_modules=["intermediate.dense"])))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    layer = merged.get_submodule("bert.encoder.layer.0.intermediate.dense")
    assert layer.r == min(layer.in_features, layer.out_features)
    assert_same(logits(merged), expected)


def test_several_adapters_merge_together_and_unload_gives_the_old_layers_back():
    model = small_bert("factored")
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    adapted.add_adapter("second", LoraConfig(r=1, target_modules=["query"]))
    drawn(adapted)
    adapted.base_model.set_adapter(["default", "second"])
    expected = logits(adapted)
    other = copy.deepcopy(adapted).merge_and_unload(safe_merge=True)
    assert_same(logits(other), expected)
    assert torch.equal(logits(adapted.unload()), before)


def test_layers_that_were_gpt2s_transposed_ones():
    model = convert(gpt2(), rank_ratio=0.4)
    inputs = MODELS["gpt2"].inputs()
    adapted = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)))
    expected = adapted(**inputs).logits
    merged = adapted.merge_and_unload()
    assert_same(merged(**inputs).logits, expected)
    dense = to_dense_model(copy.deepcopy(merged))
    assert_same(dense(**inputs).logits, expected)


@pytest.mark.parametrize("back", [fold_model, to_dense_model])
def test_a_model_folded_or_made_dense_under_its_adapter_still_merges(back):
    adapted = drawn(get_peft_model(small_bert("factored"), LoraConfig(r=2, target_modules=["query"])))
    expected = logits(adapted)
    back(adapted.get_base_model())
    assert_same(logits(adapted), expected)
    assert_same(logits(adapted.merge_and_unload()), expected)


def test_parts_of_a_folded_layer_may_be_named():
    """PEFT's own LoRA on plain linear layers: merging keeps the rank."""
    model = small_bert("folded")
    adapted = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["query.down", "query.up"])))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert_same(logits(merged), expected)
    assert merged.get_submodule("bert.encoder.layer.0.attention.self.query").up.in_features == 6


@pytest.mark.parametrize("conditioned", [True, False])
def test_factors_that_train_beside_the_adapter_obey_the_constraint(conditioned):
    model = convert(bert(), rank_ratio=0.4, tau=0.1, conditioned_start=conditioned)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for layer in factored_layers(adapted).values():
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    handle = attach_manifold_step(optimizer, adapted, warmup_steps=0 if conditioned else 3)
    before = {name: layer.U.detach().clone() for name, layer in factored_layers(adapted).items()}
    adapted.train()
    for _ in range(5):
        adapted(**INPUTS, labels=torch.arange(len(INPUTS["input_ids"])) % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_guarantee(adapted, handle)
    handle.check()
    layers = factored_layers(adapted)
    assert all(layer.bound == 1.1 for layer in layers.values())
    assert not any(torch.equal(layer.U, before[name]) for name, layer in layers.items())
    expected = logits(adapted.eval())
    assert_same(logits(adapted.merge_and_unload()), expected)


REFUSED = {
    "DoRA": ({"use_dora": True}, "received use_dora"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "received init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "factors as target parameters": ({"target_parameters": ["query.U"]}, "received target_parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_weight_is_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(ConversionError, match=message):
        get_peft_model(small_bert("factored"), LoraConfig(r=2, target_modules=["query"], **options))


def test_merging_in_place_is_refused():
    adapted = get_peft_model(small_bert("factored"), LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConversionError, match=r"Call model = model\.merge_and_unload"):
        adapted.merge_adapter()


def test_other_methods_say_that_they_do_not_know_the_layer():
    with pytest.raises(ValueError, match="LowRankLinear"):
        get_peft_model(small_bert("factored"), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))


def test_convolutions_take_adapters_when_folded():
    model = convert(resnet(), target_modules=["convolution"], rank_ratio=0.5)
    with pytest.raises(ConversionError, match=r"fold_model\(model\) and name its 'down' and 'up'"):
        get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["convolution"]))
    model = fold_model(model)
    with pytest.raises(ConversionError, match="of a convolution"):
        get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["convolution"]))
    inputs = MODELS["resnet"].inputs()
    adapted = drawn(get_peft_model(model, LoraConfig(r=2, target_modules=["down", "up"])))
    expected = adapted(**inputs).logits
    assert_same(adapted.merge_and_unload()(**inputs).logits, expected)


def test_dense_models_and_their_configs_are_left_alone():
    config = LoraConfig(r=2, target_modules=["query"], use_dora=True)
    get_peft_model(bert(), config)
    assert config._custom_modules is None


@pytest.mark.processes
@pytest.mark.parametrize("order", ["import peft, hf_condlr", "import hf_condlr, peft"])
def test_no_call_is_needed_whichever_is_imported_first(order):
    code = f"{order}\nfrom peft.tuners.lora import LoraModel\nprint(LoraModel._prepare_model.__wrapped__.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["peft.tuners.lora.model"]
