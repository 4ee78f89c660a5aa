"""At every moment a complete checkpoint lies on the disk, and in the end nothing else of this package."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_condlr.errors import CheckpointError
from tests import models
from tests.checkpoints.checkpoint_models import constrained, convert, factored_vit, layers, read_config
from tests.paths import ROOT


@pytest.mark.processes
def test_a_killed_process_and_a_full_disk_leave_a_checkpoint(tmp_path):
    """SIGKILL at 8 random points while two models, of one file and of many, are saved in turn to one folder."""
    command = [sys.executable, "-m", "tests.checkpoints.kill_while_saving", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["found"]) == 8 and set(result["found"]) <= {0, 1}, done.stderr  # the old or the new one
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


def test_writers_into_one_folder_wait_for_one_another(tmp_path):
    twins = [factored_vit(), constrained(factored_vit())]

    def save_often(model):
        for _ in range(5):
            model.save_pretrained(tmp_path, max_shard_size="5KB" if model is twins[0] else "1GB")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save_often, twins))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert any(all(torch.equal(loaded[name], value) for name, value in m.state_dict().items()) for m in twins)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", *read_config(tmp_path)["quantization_config"]["sha256"]}


def test_what_killed_writers_left_goes_also_when_the_next_save_fails(tmp_path, monkeypatch):
    model = factored_vit()
    model.save_pretrained(tmp_path)
    (tmp_path / ".condlr-dead").mkdir()
    for name in ("condlr-0123abcd.safetensors", "condlr-0123abcd.safetensors.index.json", ".condlr-dead/model.bin"):
        (tmp_path / name).write_text("left")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("condlr-"))
    assert names == ["condlr.safetensors", "config.json"]
    assert not list(tmp_path.glob("condlr-0123abcd*"))
    assert layers(AutoModelForImageClassification.from_pretrained(tmp_path))
