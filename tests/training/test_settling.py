"""CondLRTrainer with a projection after every k-th step only."""

import copy
import math

import pytest
from transformers import BertForSequenceClassification, TrainerCallback

from hf_condlr import CondLRTrainer, condition_report
from tests.training.tiny import StopAt, arguments, assert_equal_weights, convert, dense_bert, text_data

INTERVAL = {"projection_interval": 4, "learning_rate": 3e-2}


@pytest.mark.parametrize("look", ["predict", "save_model"])
def test_prediction_and_saving_by_hand_settle(look, tmp_path):
    rows = text_data()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                assert condition_report(model).max_orthonormality_error > 1e-3
                getattr(trainer, look)(rows[:8] if look == "predict" else str(tmp_path / "by-hand"))
                assert condition_report(model).max_orthonormality_error < 1e-5

    args = arguments(tmp_path, **INTERVAL)
    trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=rows, callbacks=[Look()])
    trainer.train()
    if look == "save_model":
        report = condition_report(BertForSequenceClassification.from_pretrained(tmp_path / "by-hand"))
        assert all(math.isfinite(layer.bound) for layer in report.layers)


def test_resume_within_an_interval_equals_no_interruption(tmp_path):
    dense, rows = dense_bert(), text_data()
    args = arguments(tmp_path, **INTERVAL, save_strategy="steps", save_steps=3, conditioning_warmup_ratio=0.5)
    whole = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    whole.train()
    resumed = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal_weights(whole.model, resumed.model)


def test_the_best_model_is_not_taken_for_a_displacement(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    args = arguments(tmp_path, **INTERVAL, **best, **steps, conditioning_warmup_ratio=0.0)
    scores = iter([0.9, 0.5, 0.4, 0.3])
    trainer = CondLRTrainer(
        model=convert(dense_bert()),
        args=args,
        train_dataset=text_data(),
        eval_dataset=text_data(8),
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[StopAt(10)],
    )
    trainer.train()
    assert trainer.state.best_global_step == 3
    trainer.manifold_step.settle()
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert_equal_weights(saved, trainer.model)
