"""`from_pretrained` of factored checkpoints, by every class and architecture; without the package it fails."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)

from hf_condlr import attach_manifold_step, condition_report, fold_model, to_dense_model
from hf_condlr.checkpoints.manifest import NOTICE
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import FoldedLayer, PivotedLayer
from tests import models
from tests.checkpoints.checkpoint_models import (
    ARCHITECTURES,
    build,
    constrained,
    convert,
    factored_vit,
    layers,
    output,
    read_config,
    write_config,
)
from tests.models import MODELS, logits

FORMS = {"folded": FoldedLayer, "pivoted": PivotedLayer}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_saved_and_loaded_it_is_the_same_model(case, tmp_path):
    """The same outputs to the bit, the same keys missing and unexpected as for the dense model, the factors alone."""
    model, inputs = build(case)
    model.save_pretrained(tmp_path / "dense")
    _, dense = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    constrained(convert(case, model)).eval()
    model.save_pretrained(tmp_path / "factored")
    loaded, found = type(model).from_pretrained(tmp_path / "factored", output_loading_info=True)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert {key: found[key] for key in dense} == dense
    assert {n: m.bound for n, m in layers(loaded).items()} == {n: m.bound for n, m in layers(model).items()}
    assert loaded.condlr.config == model.condlr.config

    tensors = load_file(tmp_path / "factored" / "condlr.safetensors")
    held = {p.data_ptr(): p.numel() for p in (*model.parameters(), *persistent_buffers(model))}
    assert sum(t.numel() for t in tensors.values()) == sum(held.values())
    assert sorted(os.listdir(tmp_path / "factored")) == sorted(
        {"condlr.safetensors", "config.json", *(["generation_config.json"] if model.can_generate() else [])}
    )

    for form, kind in FORMS.items():
        folded = fold_model(copy.deepcopy(model), form)
        folded.save_pretrained(tmp_path / form)
        loaded = type(model).from_pretrained(tmp_path / form)
        assert any(isinstance(module, kind) for module in loaded.modules())
        assert torch.equal(output(loaded, inputs), output(folded, inputs))


def persistent_buffers(model):
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]


@pytest.mark.parametrize(
    ("case", "head_class"),
    [
        ("vit", AutoModelForImageClassification),
        ("bert", AutoModelForSequenceClassification),
        ("gpt2", AutoModelForCausalLM),
        ("llama", AutoModelForCausalLM),
    ],
)
def test_the_bare_model_from_one_with_a_head_and_back(case, head_class, tmp_path):
    model, inputs = build(case)
    convert(case, model)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert set(layers(base)) == {
        n.removeprefix(model.base_model_prefix + ".") for n in layers(model.base_model) | layers(model)
    } & set(layers(base))
    assert len(layers(base)) >= len(layers(model.base_model)) > 0
    with torch.no_grad():
        expected, found = model.base_model(**inputs)[0], base(**inputs)[0]
    assert torch.equal(found, expected)

    base.save_pretrained(tmp_path / "base")
    again, info = head_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert len(layers(again)) == len(layers(base))
    assert not info["unexpected_keys"] or case == "vit"  # the pooler of a bare ViT
    head = MODELS[case].head
    assert all(key.startswith(head) for key in info["missing_keys"])
    with torch.no_grad():
        assert torch.equal(again.base_model(**inputs)[0], expected)


def test_auto_classes_dtype_device_map_and_shards(tmp_path):
    model = constrained(factored_vit()).eval()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("condlr-*-of-*.safetensors"))) > 1
    assert (tmp_path / "condlr.safetensors.index.json").is_file()
    inputs = MODELS["vit"].inputs()
    for options in ({}, {"device_map": "auto"}, {"dtype": "auto"}, {"dtype": torch.float32, "device_map": "cpu"}):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **options)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        expected = copy.deepcopy(model).to(dtype)
        pixels = {"pixel_values": inputs["pixel_values"].to(dtype)}
        assert torch.equal(logits(loaded, pixels), logits(expected, pixels))
        loaded.save_pretrained(tmp_path / str(dtype))
        again = AutoModelForImageClassification.from_pretrained(tmp_path / str(dtype))  # rounding is no damage
        assert torch.equal(logits(again, pixels), logits(loaded, pixels))
        wide = AutoModelForImageClassification.from_pretrained(tmp_path / str(dtype), dtype=torch.float32)
        assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_nothing_of_the_format_stays_on_a_loaded_model(tmp_path):
    """It is converted, copied, pickled, multiplied out and saved like one that was converted in memory."""
    factored_vit().save_pretrained(tmp_path / "a")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert not {"quantization_config", "transformers_weights"} & set(model.config.to_dict())
    assert not getattr(model, "is_quantized", False)
    model.half().float()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.save_pretrained.args[0] is twin
    to_dense_model(model).save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    assert "quantization_config" not in read_config(tmp_path / "dense")
    assert not layers(AutoModelForImageClassification.from_pretrained(tmp_path / "dense"))


def test_other_labels_draw_a_new_head(tmp_path):
    for head in ("dense", "low_rank"):
        folder = tmp_path / head
        convert("vit", models.vit(), head=head).save_pretrained(folder)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert type(model.classifier) is nn.Linear and model.classifier.out_features == 3
        assert torch.isfinite(model.classifier.weight).all()
        assert info["mismatched_keys"] or info["missing_keys"]
        assert len(layers(model)) == 12


def test_generate_and_pipeline(tmp_path):
    model, inputs = build("gpt2")
    convert("gpt2", model).save_pretrained(tmp_path / "gpt2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(inputs["input_ids"], **options), model.generate(inputs["input_ids"], **options))
    factored_vit().save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    classify = pipeline("image-classification", model=str(tmp_path / "vit"))
    from PIL import Image

    assert len(classify(Image.new("RGB", (20, 20)))) == 5
    assert layers(classify.model)


def test_a_loaded_model_trains_on_within_its_bound(tmp_path):
    constrained(factored_vit()).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert {layer.bound for layer in condition_report(model).layers} == {1.1}
    assert all(layer["orthonormal"] for layer in read_config(tmp_path)["quantization_config"]["layers"].values())
    assert not model.training
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    attach_manifold_step(optimizer, model)
    before = copy.deepcopy(model)
    for _ in range(3):
        model(**MODELS["vit"].inputs()).logits.square().mean().backward()
        optimizer.step()
    assert condition_report(model).max_condition_number <= 1.1 * (1 + 1e-4)
    assert all(
        not torch.equal(p, q)
        for p, q in zip(model.vit.layers.parameters(), before.vit.layers.parameters(), strict=True)
    )


PLAIN = """
import sys
sys.modules["hf_condlr"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification
for folder in sys.argv[1:]:
    for load in (AutoModel, AutoModelForImageClassification, ViTForImageClassification):
        try:
            load.from_pretrained(folder)
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print("loaded")
"""


@pytest.mark.processes
def test_plain_transformers_says_what_to_install(tmp_path):
    factored_vit().save_pretrained(tmp_path / "one")
    factored_vit().save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "one"), str(tmp_path / "shards")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count(NOTICE) == 6 and "loaded" not in done.stdout, done.stdout
    assert "pip install hf_condlr" in NOTICE and "import hf_condlr" in NOTICE


def test_a_dense_model_cannot_be_loaded_as_a_factored_one(tmp_path):
    models.vit().save_pretrained(tmp_path / "dense")
    factored_vit().save_pretrained(tmp_path / "factored")
    config = AutoConfig.from_pretrained(tmp_path / "factored")
    with pytest.raises(CheckpointError, match=r"must be those that were saved.*No such file"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "dense", config=config)


def test_another_architecture_finds_no_layers(tmp_path):
    factored_vit().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    write_config(
        tmp_path,
        models.bert().config.to_dict() | {k: config[k] for k in ("quantization_config", "transformers_weights")},
    )
    with pytest.raises(
        CheckpointError,
        match="must exist in the BertForSequenceClassification that is loaded; received no place for vit",
    ):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)
