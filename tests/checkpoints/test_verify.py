"""Damage to a checkpoint is an error before anything is changed."""

import copy
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_condlr import fold_model
from hf_condlr.checkpoints.manifest import StoredLayer
from hf_condlr.checkpoints.restore import restore_weights
from hf_condlr.checkpoints.verify import check_factors
from hf_condlr.errors import CheckpointError
from hf_condlr.files import digest
from tests.checkpoints.checkpoint_models import (
    Q,
    constrained,
    edit_manifest,
    edit_tensors,
    factored_vit,
    flip_a_bit,
    truncate,
)


def pop_dense_tensor(folder):
    """With a digest that fits: the model would draw it at random."""
    path = next(p for p in folder.glob("*.safetensors") if "classifier.bias" in load_file(p))
    edit_tensors(folder, lambda tensors: tensors.pop("classifier.bias"), path)


def replace_by(make):
    def harm(folder):
        path = next(folder.glob("*.safetensors"))
        path.unlink()
        make(path)

    return harm


DAMAGE = {
    "an endless device": (replace_by(lambda p: p.symlink_to("/dev/zero")), "weight files must be regular files"),
    "a pipe": (replace_by(os.mkfifo), "weight files must be regular files"),
    "a dense tensor missing": (pop_dense_tensor, "must hold every tensor of the model.*received none for classifier"),
    "complex factors": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.S": t[f"{Q}.S"].to(torch.complex64)})),
        f"of dtype F64, .*received {Q} of C64, F32",
    ),
    "integer factors": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.U": t[f"{Q}.U"].to(torch.int32)})),
        f"of dtype F64, .*received {Q} of F32, I32",
    ),
    "a complex dense tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"classifier.bias": t["classifier.bias"].to(torch.complex64)})),
        "floating-point where the model's is.*received classifier.bias in C64",
    ),
    "a layer that is no module": (
        lambda f: edit_manifest(f, lambda m: m["layers"].update({"__class__": m["layers"][Q]})),
        "'__class__' is not the name of a layer",
    ),
    "a layer without a place": (
        lambda f: (
            edit_tensors(f, lambda t: t.update({f"vit.x.{k}": t[f"{Q}.{k}"].clone() for k in "USV"}))
            or edit_manifest(f, lambda m: m["layers"].update({"vit.x": m["layers"][Q]}))
        ),
        "received no place for vit.x",
    ),
    "truncated": (truncate, r"those that were saved.*received another condlr[\w-]*\.safetensors"),
    "bit flipped": (flip_a_bit, "must be those that were saved, with the sha256"),
    "missing file": (
        lambda f: next(f.glob("*.safetensors")).unlink(),
        "must be those that were saved.*No such file",
    ),
    "empty file": (lambda f: next(f.glob("*.safetensors")).write_bytes(b""), "received another condlr"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.U": torch.zeros(9, 8)})),
        rf"must have the shape of the layer it stands for; received U \(9, 8\).* for {Q} of \(16, 16\)",
    ),
    "foreign factors": (
        lambda f: edit_tensors(f, lambda t: t.update({"evil.S": torch.eye(2)})),
        "factors must be those that config.json states.*received unknown factors evil",
    ),
    "missing factor": (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.V")), rf"received no {Q}\.V"),
    "a rank that lies": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(r=3)),
        rf"must be those that config.json states.*received r=3 for {Q} with U \(16, 8\)",
    ),
    "a rank that is no rank": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(r=-1)),
        "r must be an integer ≥ 1, not -1",
    ),
    "a layer that is not there": (
        lambda f: edit_manifest(f, lambda m: m["layers"].update({"x": {"r": 2}})),
        r"received no x\.U",
    ),
    "a layer that is not stated": (
        lambda f: edit_manifest(f, lambda m: m["layers"].pop(Q)),
        f"received unknown factors {Q}",
    ),
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
    "an unknown field": (
        lambda f: edit_manifest(f, lambda m: m.update(sparse=True)),
        "unexpected keyword argument 'sparse'",
    ),
    "an unknown form": (
        lambda f: edit_manifest(f, lambda m: m["layers"][Q].update(form="tucker")),
        "form must be one of factored, folded, pivoted",
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


def test_a_pipe_in_place_of_dense_weights_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight files must be readable"):
        restore_weights(factored_vit(), tmp_path)


def dropped_from_index(folder, digest_fits):
    """One shard's tensors, all dense, are no more in the index."""
    index = folder / "condlr.safetensors.index.json"
    values = json.loads(index.read_text())
    name = values["weight_map"]["classifier.bias"]
    values["weight_map"] = {key: file for key, file in values["weight_map"].items() if file != name}
    index.write_text(json.dumps(values))
    if digest_fits:
        edit_manifest(folder, lambda manifest: manifest["sha256"].update({index.name: digest(index)}))


@pytest.mark.parametrize(("digest_fits", "message"), [(True, "received an index without condlr-"), (False, "sha256")])
def test_an_index_must_name_every_file(digest_fits, message, tmp_path):
    factored_vit().save_pretrained(tmp_path, max_shard_size=100)
    dropped_from_index(tmp_path, digest_fits)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        restore_weights(factored_vit(), tmp_path)


def test_a_basis_that_is_orthonormal_in_some_directions_only_is_refused():
    """UᵀU z = z for 16 directions z, and κ(W) = 1080 by the 24 others."""
    torch.manual_seed(0)
    P, _ = torch.linalg.qr(torch.randn(40, 16, dtype=torch.float64))
    A = P @ P.mT + (torch.eye(40, dtype=torch.float64) - P @ P.mT) / 1080
    U, V = (torch.linalg.qr(torch.randn(64, 40, dtype=torch.float64))[0] for _ in range(2))
    stored = StoredLayer(r=40, tau=0.1, orthonormal=True, bound=1.1)
    check_factors("layer", (U, torch.eye(40, dtype=torch.float64), V), stored, torch.float32)
    with pytest.raises(CheckpointError, match="must have orthonormal columns"):
        check_factors("layer", (U @ A, torch.eye(40, dtype=torch.float64), V), stored, torch.float32)


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


@pytest.mark.parametrize(
    "harm", [lambda order: order.zero_(), lambda order: order.add_(1)], ids=["twice", "out of range"]
)
def test_the_order_of_a_pivoted_layer_must_be_a_permutation(harm, tmp_path):
    fold_model(factored_vit(), "pivoted").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: harm(tensors[f"{Q}.order"]))
    with pytest.raises(
        CheckpointError, match=r"the order of outputs must be a permutation; received another list.*in "
    ):
        AutoModelForImageClassification.from_pretrained(tmp_path)
