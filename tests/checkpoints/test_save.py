"""`save_pretrained` of factored models: what it states, writes and refuses."""

import os

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from hf_condlr import CondLRConfig, condition_report, fold_model, get_robust_lowrank_model, to_dense_model
from hf_condlr.errors import CheckpointError, ConversionError
from tests import models
from tests.checkpoints.checkpoint_models import Q, build, constrained, convert, factored_vit, layers, read_config
from tests.models import MODELS


def test_a_model_trained_without_the_step_states_no_more_than_holds(tmp_path):
    """Its bases are not orthonormal, its κ is what it is: it is saved and loaded all the same."""
    model = convert("vit", models.vit(), init_weights="orthogonal")  # S = c Q: the bound 1.1 holds at first
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path)
    stored = read_config(tmp_path)["quantization_config"]["layers"].values()
    assert {(layer["orthonormal"], layer["bound"]) for layer in stored} == {(False, "inf")}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.vit.layers[0].mlp.fc1.U, model.vit.layers[0].mlp.fc1.U)


def test_a_layer_used_in_several_places_is_saved_once(tmp_path):
    model, _ = build("ALBERT")
    convert("ALBERT", model).save_pretrained(tmp_path)
    stored = read_config(tmp_path)["quantization_config"]["layers"]
    assert len(stored) == 8 == len(layers(type(model).from_pretrained(tmp_path)))


def test_a_state_dict_of_ones_own_is_what_is_saved(tmp_path):
    model, other = factored_vit(), constrained(factored_vit())
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, other.classifier.weight)


def test_a_state_dict_states_what_its_own_factors_obey_and_must_fit(tmp_path):
    model = constrained(factored_vit())
    average = {name: (value + torch.randn_like(value)) / 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    stored = read_config(tmp_path)["quantization_config"]["layers"][Q]
    assert (stored["orthonormal"], stored["bound"]) == (False, "inf")
    assert AutoModelForImageClassification.from_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong in ({**average, f"{Q}.S": torch.eye(3)}, {n: v for n, v in average.items() if n != f"{Q}.S"}):
        with pytest.raises(CheckpointError, match=f"none of the right shape for {Q}.S"):
            model.save_pretrained(tmp_path, state_dict=wrong)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_processes_write_nothing(tmp_path):
    factored_vit().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"save_original_format": True},
        {"distributed_checkpoint": True},
        {"safe_serialization": False},
        {"colour": "red"},
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options, tmp_path):
    with pytest.raises(CheckpointError, match=f"have one format.*received {next(iter(options))}="):
        factored_vit().save_pretrained(tmp_path, **options)


def test_options_that_ask_for_what_is_done_anyway_are_taken(tmp_path):
    """As no-trainer scripts and older code pass them."""
    factored_vit().save_pretrained(tmp_path, variant=None, safe_serialization=True, save_function=torch.save)
    assert sorted(os.listdir(tmp_path)) == ["condlr.safetensors", "config.json"]


def test_a_model_inside_saves_its_factors_too(tmp_path):
    """Of a model with a head, and of a wrapper that is no transformers model."""
    model = convert("bert", models.bert())
    model.bert.save_pretrained(tmp_path / "inside")
    inputs = MODELS["bert"].inputs()
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "inside")
        assert torch.equal(loaded(**inputs)[0], model.bert(**inputs)[0])
    wrapper = nn.Sequential(models.vit(transformers.ViTModel))
    convert("vit", wrapper)
    wrapper[0].save_pretrained(tmp_path / "wrapped")
    assert len(layers(AutoModel.from_pretrained(tmp_path / "wrapped"))) == len(layers(wrapper))
    to_dense_model(wrapper)[0].save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_a_folded_layer_is_not_factored_again(tmp_path):
    model = fold_model(factored_vit())
    with pytest.raises(ConversionError, match="must match at least one layer"):
        convert("vit", model)
    with pytest.raises(ConversionError, match=r"q_proj\.down': part of a folded layer"):
        get_robust_lowrank_model(model, CondLRConfig(target_modules=["down"], rank_ratio=0.5))


def test_a_head_untied_in_memory_is_saved_as_such(tmp_path):
    """Its config still says that head and embeddings share their weight."""
    model = models.gpt2()
    assert model.config.tie_word_embeddings
    convert("gpt2", model)
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_a_model_offloaded_to_the_disk_is_reported_on_and_saved(tmp_path):
    model = constrained(factored_vit())
    model.save_pretrained(tmp_path / "a")
    places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    load = AutoModelForImageClassification.from_pretrained
    offloaded = load(tmp_path / "a", device_map=places, offload_folder=tmp_path / "offloaded")
    assert offloaded.vit.layers[0].mlp.fc1.U.is_meta
    assert condition_report(offloaded).to_dict() == condition_report(model).to_dict()
    with pytest.warns(UserWarning, match="offloaded"):
        offloaded.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@models.transformers_adapters
def test_adapters_are_refused_by_name(tmp_path):
    model = factored_vit()
    model.add_adapter(LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(CheckpointError, match=r"holds the model and no adapters.*delete_adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_peft_model_with_factored_layers_does_not_save_its_adapter_alone(tmp_path):
    model = get_peft_model(models.vit(), LoraConfig(r=2, target_modules=["q_proj"]))
    get_robust_lowrank_model(model, CondLRConfig(target_modules=["fc1"], rank_ratio=0.5))
    with pytest.raises(CheckpointError, match=r"saves its adapter only.*merge_and_unload"):
        model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.vit.layers[0].mlp.fc1.U, merged.vit.layers[0].mlp.fc1.U)
