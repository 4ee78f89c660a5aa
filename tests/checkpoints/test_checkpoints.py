"""A factored checkpoint lives like any other: saved, sharded, loaded by every class, and never silently wrong."""

import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)

from hf_condlr import (
    CondLRConfig,
    attach_manifold_step,
    condition_report,
    fold_model,
    get_robust_lowrank_model,
    to_dense_model,
)
from hf_condlr.checkpoints.manifest import NOTICE, Manifest
from hf_condlr.checkpoints.restore import restore_weights, weight_files
from hf_condlr.errors import CheckpointError, ConversionError
from hf_condlr.layers import FoldedLayer, LowRankLayer
from tests import models
from tests.conversion import test_architectures
from tests.models import MODELS, logits
from tests.paths import ROOT

ARCHITECTURES = [*MODELS, *test_architectures.CASES]


def build(case):
    if case in MODELS:
        return MODELS[case].build(), MODELS[case].inputs()
    return test_architectures.build(case)


def convert(case, model, **kwargs):
    pattern = {
        **test_architectures.NAMED,
        "resnet": r".*\.convolution",
        "convnext": r".*\.(pwconv1|downsampling_layer\.1)",
    }
    settings = {"target_modules": pattern.get(case, "all-linear"), "rank_ratio": 0.5, "tau": 0.1} | kwargs
    return get_robust_lowrank_model(model, CondLRConfig(**settings))


def output(model, inputs):
    with torch.no_grad():
        return test_architectures.output(model, inputs)


def factored_vit():
    return convert("vit", models.vit())


def constrained(model):
    """A training step, so that bounds are in force."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    attach_manifold_step(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------- save and load


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


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}


def persistent_buffers(model):
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_folded_models_are_saved_and_loaded_too(case, tmp_path):
    model, inputs = build(case)
    fold_model(convert(case, model)).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert any(isinstance(module, FoldedLayer) for module in loaded.modules())
    assert torch.equal(output(loaded, inputs), output(model, inputs))


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


# --------------------------------------------------------------------------------------------------- fail closed


PLAIN = """
import sys
sys.modules["hf_condlr"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification, pipeline
for load in (AutoModel, AutoModelForImageClassification, ViTForImageClassification):
    try:
        load.from_pretrained(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("loaded")
"""


def test_plain_transformers_says_what_to_install(tmp_path):
    for name, options in (("one", {}), ("shards", {"max_shard_size": "5KB"})):
        factored_vit().save_pretrained(tmp_path / name, **options)
        command = [sys.executable, "-c", PLAIN, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.count(NOTICE) == 3, done.stdout
        assert "loaded" not in done.stdout
    assert "pip install hf_condlr" in NOTICE and "import hf_condlr" in NOTICE


def test_a_dense_model_cannot_be_loaded_as_a_factored_one(tmp_path):
    models.vit().save_pretrained(tmp_path / "dense")
    factored_vit().save_pretrained(tmp_path / "factored")
    config = AutoConfig.from_pretrained(tmp_path / "factored")
    with pytest.raises(CheckpointError, match="every weight file of a checkpoint must be there"):
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


# -------------------------------------------------------------------------------------------------------- damage


def edit_manifest(folder, edit):
    config = read_config(folder)
    edit(config["quantization_config"])
    write_config(folder, config)


def edit_tensors(folder, edit):
    """With a digest that fits: someone changed file and digest."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest["sha256"].update({path.name: digest}))


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-50] ^= 1  # the least of some weight: no other check could see it
    path.write_bytes(data)


Q = "vit.layers.0.attention.q_proj"
DAMAGE = {
    "truncated": (truncate, r"must be the one that was saved.*condlr-?[\w-]*\.safetensors with"),
    "bit flipped": (flip_a_bit, "must be the one that was saved, with the sha256"),
    "missing file": (
        lambda f: next(f.glob("*.safetensors")).unlink(),
        "every weight file of a checkpoint must be there",
    ),
    "empty file": (lambda f: next(f.glob("*.safetensors")).write_bytes(b""), "must be the one that was saved"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.U": torch.zeros(9, 8)})),
        rf"must have the shape of the layer it stands for; received U \(9, 8\).* for {Q} of \(16, 16\)",
    ),
    "foreign factors": (
        lambda f: edit_tensors(f, lambda t: t.update({"evil.S": torch.eye(2)})),
        "no factors that config.json does not state; received evil",
    ),
    "missing factor": (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.V")), rf"received no {Q}\.V"),
    "a rank that lies": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(r=3)),
        rf"must be that of the factors; received r=3 for {Q} with U \(16, 8\)",
    ),
    "a rank that is no rank": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(r=-1)),
        "r must be an integer ≥ 1, not -1",
    ),
    "a layer that is not there": (
        lambda f: edit_manifest(f, lambda m: m["layers"].update({"x": {"r": 2}})),
        r"received no x\.U",
    ),
    "a layer that is not stated": (lambda f: edit_manifest(f, lambda m: m["layers"].pop(Q)), f"received {Q}"),
    "condition broken": (
        lambda f: edit_tensors(f, lambda t: t[f"{Q}.S"].mul_(torch.linspace(1, 1.2, 8))),
        rf"κ\(S\) must be at most 1.1 as config.json states; received κ = 1.\d+ in {Q}",
    ),
    "bases broken": (
        lambda f: edit_tensors(f, lambda t: t[f"{Q}.U"].mul_(1.01)),
        f"must have orthonormal columns; received an orthonormality error of .* in {Q}",
    ),
    "not finite": (
        lambda f: edit_tensors(f, lambda t: t[f"{Q}.S"].fill_(math.nan)),
        f"U, S and V must be finite; received a value that is not in {Q}",
    ),
    "from the future": (
        lambda f: edit_manifest(f, lambda m: m.update(format=2)),
        "reads format 1 .*received format 2.*Upgrade",
    ),
    "an unknown field": (lambda f: edit_manifest(f, lambda m: m.update(sparse=True)), "received unknown sparse"),
    "an unknown form": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(form="tucker")),
        "form must be one of factored, folded",
    ),
    "no layers": (lambda f: edit_manifest(f, lambda m: m.pop("layers")), "must describe a factored checkpoint"),
    "a path elsewhere": (
        lambda f: edit_manifest(f, lambda m: m.update(weights="../condlr.safetensors")),
        r"'\.\./condlr.safetensors' is not the name of a weight file",
    ),
    "a pickle": (
        lambda f: edit_manifest(f, lambda m: m.update(weights="condlr.bin")),
        "'condlr.bin' is not the name of a weight file",
    ),
    "an unknown config field": (
        lambda f: edit_manifest(f, lambda m: m["config"].update(shape="round")),
        "a CondLRConfig file must hold its fields only; received unknown shape",
    ),
}


@pytest.mark.parametrize(
    ("damage", "shards"),
    [(damage, False) for damage in DAMAGE]
    + [(damage, True) for damage in DAMAGE if "edit_tensors" not in DAMAGE[damage][0].__code__.co_names],
)
def test_damage_is_a_clear_error(damage, shards, tmp_path):
    constrained(factored_vit()).save_pretrained(tmp_path, max_shard_size="5KB" if shards else "1GB")
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_broken_condition_changes_nothing_in_a_model_that_resumes(tmp_path):
    constrained(factored_vit()).save_pretrained(tmp_path)
    harm, message = DAMAGE["condition broken"]
    harm(tmp_path)
    model = factored_vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        restore_weights(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="a checkpoint is a folder; received 'true'"):
        restore_weights(model, "true")


def test_damaged_json_is_an_error(tmp_path):
    factored_vit().save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / "condlr.safetensors.index.json"
    index.write_text(index.read_text()[:-10])
    with pytest.raises(CheckpointError, match="JSON files must be readable"):
        restore_weights(factored_vit(), tmp_path)
    with pytest.raises(ValueError):
        AutoModelForImageClassification.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------- atomic


def test_a_killed_process_and_a_full_disk_leave_a_checkpoint(tmp_path):
    """SIGKILL at 20 random points while two models, of one file and of many, are saved in turn to one folder."""
    command = [sys.executable, "-m", "tests.checkpoints.kill_while_saving", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["found"]) == 20 and set(result["found"]) <= {0, 1}, done.stderr  # the old or the new one
    assert result["in_a_save"] > 0  # kills that came in the middle
    assert result["files"] == ["condlr.safetensors", "config.json"]  # and the next save tidied up
    assert (
        "a checkpoint must be written completely" in result["full"]
        and "as complete as before. Free space" in result["full"]
    )
    assert result["after"] == 0


@pytest.mark.parametrize("fails_at", range(1, 5))
def test_a_failed_rename_leaves_a_checkpoint(fails_at, tmp_path, monkeypatch):
    model = factored_vit()
    model.save_pretrained(tmp_path)
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        constrained(model).save_pretrained(tmp_path, max_shard_size="5KB")
    assert layers(AutoModelForImageClassification.from_pretrained(tmp_path))


def test_without_hard_links_it_copies(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    model = factored_vit()
    model.save_pretrained(tmp_path)
    constrained(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert sorted(os.listdir(tmp_path)) == ["condlr.safetensors", "config.json"]


def test_a_factored_checkpoint_takes_the_place_of_a_dense_one_and_leaves_other_files(tmp_path):
    models.vit().save_pretrained(tmp_path, max_shard_size="5KB")
    mine = ["condlr-old.safetensors", "model-backup.safetensors", "model-ema.safetensors", "notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        convert("vit", models.vit()).save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(["condlr.safetensors", "config.json", *mine])


def test_the_manifest_survives_json(tmp_path):
    model = convert("vit", models.vit(), tau="inf")
    model.save_pretrained(tmp_path)
    _, manifest = weight_files(tmp_path)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict(), allow_nan=False))) == manifest
    assert manifest.layers[Q].tau == manifest.layers[Q].bound == math.inf
