"""Checkpoints and cards of factored models in a Trainer: complete, checked, and nothing that runs."""

import copy
import logging
import math
import pickle

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from hf_condlr import CondLRTrainer, FactoredTrainer
from hf_condlr.checkpoints.restore import restore_weights
from hf_condlr.errors import CheckpointError
from tests.training.tiny import CASES, arguments, assert_equal_weights, convert, dense_bert, text_data


@pytest.mark.parametrize("damage", ["truncated", "missing file", "missing tensor", "unknown tensor", "wrong shape"])
def test_damaged_weights_are_refused_and_nothing_is_loaded(damage, tmp_path):
    model = convert(dense_bert())
    model.save_pretrained(tmp_path)
    path = tmp_path / "condlr.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing file":
        path.unlink()
    other = convert(dense_bert())
    if damage in ("missing tensor", "unknown tensor"):  # on one side or the other
        bare = other if damage == "missing tensor" else model
        bare.classifier.register_parameter("scale", nn.Parameter(torch.ones(2)))
        model.save_pretrained(tmp_path)
    elif damage == "wrong shape":
        other = convert(dense_bert(), rank_ratio=0.4)
    before = copy.deepcopy(other)
    messages = {
        "truncated": "with the sha256",
        "missing file": "No such file",
        "missing tensor": "received no classifier.scale",
        "unknown tensor": "received unknown classifier.scale",
        "wrong shape": r"received bert\..* of shape .* for \(",
    }
    with pytest.raises(CheckpointError, match=messages[damage]):
        restore_weights(other, tmp_path)
    assert_equal_weights(other, before)


@pytest.mark.parametrize("case", CASES)
def test_restore_from_shards_and_renamed_keys(case, tmp_path):
    build, _ = CASES[case]
    model, other = convert(build()), convert(build())
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    restore_weights(other, tmp_path)
    assert_equal_weights(model, other)
    assert math.isfinite(sum(p.sum().item() for p in other.parameters()))


def test_resuming_passes_over_a_checkpoint_that_was_not_written_whole(tmp_path, caplog):
    args, rows = arguments(tmp_path, save_strategy="steps", save_steps=4), text_data()
    dense = dense_bert()
    whole = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    whole.train()
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()  # killed before the last file
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": ')
    (tmp_path / "checkpoint-notes").mkdir()
    resumed = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        resumed.train(resume_from_checkpoint=True)
    assert [word for word in ("checkpoint-12", "checkpoint-8", "checkpoint-4") if word in caplog.text] == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    assert_equal_weights(whole.model, resumed.model)


def test_resuming_from_nothing_is_an_error(tmp_path):
    trainer = CondLRTrainer(model=convert(dense_bert()), args=arguments(tmp_path), train_dataset=text_data())
    with pytest.raises(CheckpointError, match="needs a checkpoint in output_dir; received none in"):
        trainer.train(resume_from_checkpoint=True)


class Intruder:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_that_runs_is_unpickled(name, tmp_path):
    args, rows = arguments(tmp_path / "out", save_strategy="steps", save_steps=6), text_data()
    CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=rows).train()
    torch.save({"state": Intruder(tmp_path / "intruded")}, tmp_path / "out" / "checkpoint-6" / name)
    trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=rows)
    with pytest.raises(pickle.UnpicklingError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert not (tmp_path / "intruded").exists()


def test_a_checkpoint_of_the_trainer_is_an_ordinary_one(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=6)
    trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=text_data())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-12", "final"):
        assert_equal_weights(BertForSequenceClassification.from_pretrained(tmp_path / folder), trainer.model)


@pytest.mark.parametrize("cls", [CondLRTrainer, FactoredTrainer])
def test_the_best_model_and_its_metrics_go_into_the_card(cls, tmp_path):
    """Also of a model whose factors train freely, which Trainer itself could not restore."""
    scores = iter([0.5, 0.9, 0.6, 0.7])
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    args = arguments(tmp_path, conditioning_warmup_ratio=0.0, **options, **best)
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            kept[state.global_step] = copy.deepcopy(model.state_dict())

    trainer = cls(
        model=convert(dense_bert()),
        args=args,
        train_dataset=text_data(),
        eval_dataset=text_data(8),
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[Keep()],
    )
    trainer.train()
    assert trainer.state.best_global_step == 12
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, kept[12][name])

    def score():
        trainer.create_model_card(tags="mine")
        card = ModelCard.load(tmp_path / "README.md")
        assert "mine" in card.data.tags
        return next(result.metric_value for result in card.data.eval_results if "score" in result.metric_name)

    assert score() == 0.9
    trainer.evaluate()
    assert score() == 0.7


def test_a_freely_trained_model_resumes(tmp_path):
    args, rows, dense = arguments(tmp_path, save_strategy="steps", save_steps=6), text_data(), dense_bert()
    whole = FactoredTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    whole.train()
    resumed = FactoredTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal_weights(whole.model, resumed.model)
