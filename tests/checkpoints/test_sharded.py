"""Damage to sharded checkpoints, on one process; `tests.distributed.test_sharding` resumes from intact ones."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_condlr import CondLRConfig, get_robust_lowrank_model, load_sharded, save_sharded
from hf_condlr.errors import CheckpointError
from hf_condlr.files import digest


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
    get_robust_lowrank_model(model, CondLRConfig(target_modules=["0", "2"], r=4, tau="inf"))
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def weights(model):
    return [p.full_tensor().clone() for p in model.parameters()]


def same(model, other):
    return all(map(torch.equal, weights(model), weights(other)))


@pytest.fixture
def saved(tmp_path):
    model = build()
    save_sharded(tmp_path / "out", model)
    again = build(1)
    load_sharded(tmp_path / "out", again)
    assert same(model, again)
    return tmp_path / "out"


def shard(folder):
    return next((folder / "weights").glob("*.safetensors"))


def flip_a_bit(folder):
    data = bytearray(shard(folder).read_bytes())
    data[-50] ^= 1
    shard(folder).write_bytes(data)


def scale_a_basis(folder):
    """With a digest that fits: bases that are stated to be orthonormal are not."""
    path = shard(folder)
    tensors = load_file(path)
    tensors["0.U"] *= 2
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    state = json.loads((folder / "state.json").read_text())
    state["files"][path.relative_to(folder).as_posix()] = digest(path)
    (folder / "state.json").write_text(json.dumps(state))


def forget_a_layer(folder):
    state = json.loads((folder / "state.json").read_text())
    del state["layers"]["0"]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "must hold the files that were saved.*received another weights/shard"),
        (lambda folder: shard(folder).unlink(), "must hold the files that were saved.*received another weights/shard"),
        (lambda folder: os.truncate(folder / "state.json", 100), "completely; received"),
        (lambda folder: (folder / "state.json").write_text("[]"), "completely; received"),
        (scale_a_basis, "U and V must have orthonormal columns"),
        (forget_a_layer, "received factors of 0 there or here only"),
    ],
)
def test_damage_is_an_error(saved, damage, message):
    damage(saved)
    model = build(1)
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        load_sharded(saved, model)
    if damage is not scale_a_basis:  # seen when everything is loaded only
        assert all(map(torch.equal, weights(model), before))


def test_a_death_between_the_two_renames_leaves_the_earlier_checkpoint(saved, monkeypatch):
    first, rename = build(), os.rename

    def die(source, target):
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        save_sharded(saved, build(2))
    assert not saved.exists()
    monkeypatch.undo()
    again = build(1)
    load_sharded(saved, again)
    assert same(first, again)
    save_sharded(saved, build(3))
    load_sharded(saved, again)
    assert same(build(3), again)
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    shutil.rmtree(saved)
