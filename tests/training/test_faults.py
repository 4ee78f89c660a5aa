"""What goes wrong in a training, as a user of the Trainer meets it: nothing is lost, and it is said what and where."""

import copy
import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_condlr import CondLRTrainer, attach_manifold_step
from hf_condlr.checkpoints.restore import last_complete_checkpoint
from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.layers import LowRankLinear, factored_layers
from hf_condlr.linalg import condition_number, orthonormality_error
from hf_condlr.training import finite
from tests.paths import ROOT
from tests.training.tiny import arguments, assert_equal_weights, convert, dense_vit, image_data


def trainer_of(folder, model=None, rows=None, **options):
    """12 steps of a small ViT; κ bounded from the first one on."""
    args = arguments(folder, logging_steps=1, **({"conditioning_warmup_ratio": 0.0} | options))
    return CondLRTrainer(model=model or convert(dense_vit()), args=args, train_dataset=rows or image_data())


def assert_sound(trainer):
    """The guarantee, and nothing anywhere that is not finite."""
    for name, p in trainer.model.named_parameters():
        assert torch.isfinite(p).all(), name
        for key, value in trainer.optimizer.state.get(p, {}).items():
            assert torch.isfinite(torch.as_tensor(value)).all(), (name, key)
    for name, layer in factored_layers(trainer.model).items():
        for basis in (layer.U, layer.V):
            assert orthonormality_error(basis.detach()).item() <= 1e-5 * math.sqrt(layer.r), name
        assert condition_number(layer.S.detach()).item() <= layer.bound * (1 + 1e-4), name


# ------------------------------------------------------------------------------------------------ bad gradients


def test_a_bad_sample_costs_its_step_only(tmp_path, caplog):
    """NaN in one image: the loss of its batch is NaN, and clipping would make every gradient so."""
    rows = image_data()
    rows[7]["pixel_values"] = rows[7]["pixel_values"] * math.nan
    trainer = trainer_of(tmp_path, rows=rows)
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        trainer.train()
    assert_sound(trainer)
    [said] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "gradients that are not finite in vit." in said and "look at the samples of that batch" in said
    assert [e["steps_left_out"] for e in trainer.state.log_history if "steps_left_out" in e][-1] == 2  # once an epoch
    assert trainer.manifold_step.step_count == 12


def test_inf_in_one_entry_of_one_gradient_is_named(tmp_path, caplog):
    model, calls = convert(dense_vit()), []

    def spoil(gradient):
        calls.append(None)
        if len(calls) == 3:
            gradient = gradient.clone()
            gradient[0, 0] = math.inf
        return gradient

    model.vit.layers[1].mlp.fc1.U.register_hook(spoil)
    trainer = trainer_of(tmp_path, model)
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        trainer.train()
    assert_sound(trainer)
    assert "step 3 is left out: gradients that are not finite in vit.layers.1.mlp.fc1.U. Later" in caplog.text


def test_a_training_that_is_lost_ends_with_an_error(tmp_path, monkeypatch):
    """Nothing but NaN: weights are as they were before, and training can resume from the last checkpoint."""
    monkeypatch.setattr(finite, "PATIENCE", 4)
    model = convert(dense_vit())
    trainer = trainer_of(tmp_path, model, save_strategy="steps", save_steps=2)
    model.classifier.register_forward_hook(lambda m, x, y: y * (math.nan if trainer.state.global_step >= 5 else 1))
    with pytest.raises(OptimizerError, match=r"one of 4 steps .* received none up to step 9, this time in .*vit\."):
        trainer.train()
    assert_sound(trainer)
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-8")


def test_what_is_not_finite_is_never_saved(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                model.classifier.bias.data[0] = math.nan

    trainer.add_callback(Spoil())
    with pytest.raises(OptimizerError, match=r"finite parameters; received NaN or inf in classifier\.bias at step 8"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("kind", "USV")
def test_factors_that_are_not_finite_are_refused_by_name(kind):
    """When the step is attached, and when other code writes them later, before the optimizer moves anything."""
    model = nn.ModuleDict({"a": LowRankLinear(8, 6, 3), "b": LowRankLinear(8, 6, 3)})
    optimizer = torch.optim.AdamW(model.parameters())
    handle = attach_manifold_step(optimizer, model)
    with torch.no_grad():
        getattr(model["b"], kind)[0, 0] = math.nan
    before = copy.deepcopy(model["a"].state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ConditioningError, match=r"factors must be finite; received NaN or inf in b\. Load"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model["a"].state_dict().items())
    handle.remove()
    with pytest.raises(ConditioningError, match=r"factors must be finite; received NaN or inf in b\. Load"):
        attach_manifold_step(optimizer, model)


@pytest.mark.parametrize("lr", [3.0, 1e30])  # a thousand times too large, and beyond
def test_absurd_learning_rates_break_nothing(lr, tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=lr)
    trainer.train()
    assert_sound(trainer)


def test_zero_gradients_a_layer_without_any_and_a_batch_of_one(tmp_path):
    model = convert(dense_vit())
    layer = model.vit.layers[0].mlp.fc1
    layer.register_forward_hook(lambda m, x, y: y.detach())
    model.classifier.register_forward_hook(lambda m, x, y: 0.0 * y)
    trainer = trainer_of(tmp_path, model, image_data(5), per_device_train_batch_size=1)
    trainer.create_optimizer()
    bases = [p.detach().clone() for p in (layer.U, layer.V)]
    trainer.train()
    assert trainer.manifold_step.step_count == 10 and layer.U.grad is None
    assert_sound(trainer)
    assert all(torch.equal(p, q) for p, q in zip(bases, (layer.U, layer.V), strict=True))


# --------------------------------------------------------------------------------------------- half checkpoints


def test_a_full_disk_while_the_optimizer_is_saved(tmp_path, monkeypatch):
    """The error comes through; training resumes from the old checkpoint, to the same end."""
    dense, rows, save = dense_vit(), image_data(), torch.save
    options = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    whole = trainer_of(tmp_path / "whole", convert(copy.deepcopy(dense)), rows, **options)
    whole.train()

    def half(values, path, *args, **kwargs):
        save(values, path, *args, **kwargs)
        if str(path).endswith("checkpoint-8/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            trainer_of(out, convert(copy.deepcopy(dense)), rows, **options).train()
    assert last_complete_checkpoint(str(out)).endswith("checkpoint-4")
    resumed = trainer_of(out, convert(copy.deepcopy(dense)), rows, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(whole.model, resumed.model)


def test_a_checkpoint_that_is_overwritten_is_not_whole_until_the_end(tmp_path, monkeypatch):
    """An earlier training left its state file under the same name."""
    rows = image_data()
    trainer_of(tmp_path, rows=rows, save_strategy="steps", save_steps=4).train()
    again = trainer_of(tmp_path, rows=rows, save_strategy="steps", save_steps=4)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "_save_scaler", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").exists()


def test_the_state_file_waits_for_every_process(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=12)
    found = []
    monkeypatch.setattr(
        trainer.accelerator, "wait_for_everyone", lambda: found.append({p.name for p in tmp_path.glob("*-12/*")})
    )
    trainer.train()
    assert any("rng_state.pth" in names and "trainer_state.json" not in names for names in found)


@pytest.mark.processes
def test_killed_trainings_end_as_if_they_had_not_been(tmp_path):
    """A kill of one process, and of one of two: the other one ends with an error, at once."""
    sizes = ["--kills", "1", "--rank_kills", "1", "--steps", "8"]
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", *sizes, "--output", str(tmp_path / "record.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["one"]["kills"] == 1 and record["one"]["equal"] == record["one"]["trainings"]
    assert record["two"]["kills"] == 1 and record["two"]["equal"] == record["two"]["trainings"]
    assert all(seconds < 60 for seconds in record["two"]["seconds"])
    assert not any(text.startswith(("0:", "None:")) for text in record["two"]["said"])
