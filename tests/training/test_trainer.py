"""CondLRTrainer: the manifold step inside transformers' Trainer, its records, and nothing lost on resume."""

import copy
import json
import logging
import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer

from hf_condlr import (
    CondLRSeq2SeqTrainer,
    CondLRSeq2SeqTrainingArguments,
    CondLRTrainer,
    condition_report,
    to_dense_model,
)
from tests.training.tiny import (
    CASES,
    AfterEachStep,
    StopAt,
    arguments,
    assert_equal_weights,
    convert,
    dense_bert,
    text_data,
)


def test_training_keeps_the_guarantee_and_logs_it(tmp_path):
    trainer = CondLRTrainer(model=convert(dense_bert()), args=arguments(tmp_path), train_dataset=text_data())
    trainer.train()
    assert trainer.manifold_step.step_count == 12
    assert trainer.manifold_step.state_dict()["warmup_steps"] == 4  # ⌈0.3 · 12⌉
    report = condition_report(trainer.model)
    assert report.max_condition_number <= 1.1 * (1 + 1e-4)
    assert {layer.bound for layer in report.layers} == {1.1}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert entry["kappa_mean"] <= entry["kappa_max"] <= entry["kappa_bound"] * (1 + 1e-4)
        assert entry["orthonormality_error"] < 1e-5
        assert 0 < entry["compression"] < 1
    assert logged[0]["kappa_bound"] > 1.1  # the warm-up


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_any_optimizer(optim, tmp_path):
    args = arguments(tmp_path, optim=optim, bf16=True, gradient_accumulation_steps=2, conditioning_warmup_ratio=0.0)
    trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=text_data())
    trainer.train()
    assert trainer.manifold_step.step_count == 6
    assert trainer.manifold_step.metric_scaling == (optim == "sgd")
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


def test_unbounded_tau_leaves_strict_json(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=12)
    trainer = CondLRTrainer(model=convert(dense_bert(), tau="inf"), args=args, train_dataset=text_data())
    trainer.train()
    text = (tmp_path / "checkpoint-12" / "trainer_state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert "kappa_max" in text and "kappa_bound" not in text


@pytest.mark.parametrize("case", CASES)
def test_resume_in_the_warm_up_equals_no_interruption(case, tmp_path):
    build, data = CASES[case]
    dense, rows = build(), data()
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, conditioning_warmup_ratio=0.5)
    whole = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    whole.train()
    resumed = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.manifold_step.step_count == 12
    assert resumed.manifold_step.state_dict() == whole.manifold_step.state_dict()
    assert_equal_weights(whole.model, resumed.model)


@pytest.mark.parametrize("case", CASES)
def test_best_model_is_restored_whole_and_never_from_the_warm_up(case, tmp_path):
    build, data = CASES[case]
    metrics = iter([9.0, 5.0, 7.0, 3.0])  # the best two evaluations: in the warm-up, then at step 9

    class Scripted(CondLRTrainer):
        def evaluate(self, *args, **kwargs):
            output = super().evaluate(*args, **kwargs) | {"eval_score": next(metrics)}
            self.kept = getattr(self, "kept", {})
            self.kept[self.state.global_step] = copy.deepcopy(self.model.state_dict())
            return output

    args = arguments(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=3,
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        conditioning_warmup_ratio=0.5,
    )
    trainer = Scripted(model=convert(build()), args=args, train_dataset=data(), eval_dataset=data(8))
    trainer.train()
    assert trainer.state.best_metric == 7.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-9")
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, trainer.kept[9][key]), key
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


def test_ending_in_the_warm_up_is_said(tmp_path, caplog):
    args = arguments(tmp_path, conditioning_warmup_ratio=1.0)
    trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=text_data(), callbacks=[StopAt(3)])
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        trainer.train()
    assert "ended at step 3 of a conditioning warm-up of 12" in caplog.text
    assert condition_report(trainer.model).layers[0].bound > 1.1


def test_weight_decay_spares_the_bases_only(tmp_path):
    trainer = CondLRTrainer(
        model=convert(dense_bert()), args=arguments(tmp_path, weight_decay=0.1), train_dataset=text_data()
    )
    trainer.create_optimizer()
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    names = {name: decay[id(p)] for name, p in trainer.model.named_parameters()}
    assert all(value == 0.0 for name, value in names.items() if name.endswith((".U", ".V", "bias")))
    assert all(value == 0.1 for name, value in names.items() if name.endswith(".S"))


def test_a_new_model_of_model_init_is_constrained_too(tmp_path):
    args = arguments(tmp_path, conditioning_warmup_ratio=0.0)
    trainer = CondLRTrainer(model_init=lambda: convert(dense_bert()), args=args, train_dataset=text_data())
    for _ in range(2):
        trainer.train()
        assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)
        assert condition_report(trainer.model).max_orthonormality_error <= 1e-5


def test_training_on_does_not_lift_the_bound(tmp_path):
    trainer = CondLRTrainer(model=convert(dense_bert()), args=arguments(tmp_path), train_dataset=text_data())
    trainer.train()
    trainer.args.num_train_epochs = 20
    trainer.add_callback(StopAt(2))
    trainer.train()
    assert set(trainer.manifold_step.bounds().values()) == {1.1}
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


def test_evaluation_metrics_hold_the_condition_and_what_is_the_users_own(tmp_path):
    rows = text_data(8)
    args = arguments(tmp_path)
    trainer = CondLRTrainer(
        model=convert(dense_bert()),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda output: {"perplexity": math.inf},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == math.inf
    assert metrics["eval_kappa_max"] > 1.1
    to_dense_model(trainer.model)
    assert "eval_kappa_max" not in trainer.evaluate()


@pytest.mark.parametrize("case", CASES)  # BERT's head drops num_items_in_batch, ViT's uses it
def test_accumulation_equals_the_joined_batch(case, tmp_path):
    """4 × 8 against 32, three AdamW steps in float64, to 1e-10 (measured: 1e-15)."""
    build, data = CASES[case]
    dense, rows = build().double(), data(96)
    for row in rows:
        row |= {key: value.double() for key, value in row.items() if key == "pixel_values"}
    results = []
    for parts in (1, 4):
        args = arguments(
            tmp_path / str(parts),
            per_device_train_batch_size=32 // parts,
            gradient_accumulation_steps=parts,
            num_train_epochs=1,
            distillation_weight=0.3,
            optim="adamw_torch",
        )
        model, teacher = convert(copy.deepcopy(dense)), copy.deepcopy(dense)
        trainer = CondLRTrainer(model=model, args=args, train_dataset=rows, teacher=teacher)
        trainer.train()
        assert trainer.manifold_step.step_count == 3
        results.append(model)
    for (name, first), second in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_clipping_sees_gradients_before_the_projection(tmp_path):
    """The logged norm is that of backward's gradients, vertical part included, as a plain Trainer's is."""
    model, rows = convert(dense_bert()), text_data(8)
    norms = []
    for cls in (CondLRTrainer, Trainer):
        args = arguments(tmp_path, max_steps=1, logging_steps=1, max_grad_norm=1e-3)
        trainer = cls(model=copy.deepcopy(model), args=args, train_dataset=rows)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_seq2seq_trainer(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    rows = [{"input_ids": torch.randint(1, 40, (6,)), "labels": torch.randint(1, 40, (5,))} for _ in range(16)]
    args = arguments(tmp_path, CondLRSeq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6)
    watch = AfterEachStep()
    trainer = CondLRSeq2SeqTrainer(
        model=convert(T5ForConditionalGeneration(config)),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[watch],
    )
    trainer.train()
    assert watch.steps == 4
    assert trainer.predict(rows[:4]).predictions.shape[0] == 4
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


# ----------------------------------------------------------------------------------------------------- refusals
