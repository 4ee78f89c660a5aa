"""CondLRTrainer: the manifold step inside transformers' Trainer, its records, and nothing lost on resume."""

import copy
import json
import logging
import math
import pickle

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from hf_condlr import (
    CondLRSeq2SeqTrainer,
    CondLRSeq2SeqTrainingArguments,
    CondLRTrainer,
    FactoredTrainer,
    condition_report,
    to_dense_model,
)
from hf_condlr.checkpoints.restore import restore_weights
from hf_condlr.errors import CheckpointError, ConfigError
from hf_condlr.training import distillation_loss
from tests.training.tiny import (
    CASES,
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


def test_distillation_of_a_causal_model_counts_the_predicted_tokens(tmp_path):
    """Only position 4 predicts the one label, at position 5."""
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    teacher = GPT2LMHeadModel(config)
    student = convert(copy.deepcopy(teacher)).train()
    args = arguments(tmp_path, distillation_weight=1.0, distillation_temperature=1.0)
    trainer = CondLRTrainer(model=student, args=args, train_dataset=text_data(8), teacher=teacher)
    ids, labels = torch.randint(0, 30, (1, 7)), torch.full((1, 7), -100)
    labels[0, 5] = 3
    loss = trainer.compute_loss(student, {"input_ids": ids, "labels": labels})
    p, q = teacher.eval()(ids).logits[0, 4].log_softmax(-1), student(ids).logits[0, 4].log_softmax(-1)
    assert loss.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)


def test_evaluation_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="bf16_full_eval must be off"):
        arguments(tmp_path, bf16_full_eval=True)


def test_a_users_own_optimizer_gets_the_step(tmp_path):
    model = convert(dense_bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = CondLRTrainer(
        model=model, args=arguments(tmp_path), train_dataset=text_data(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert trainer.manifold_step.step_count == 12
    assert condition_report(model).max_condition_number <= 1.1 * (1 + 1e-4)


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
    trainer = CondLRSeq2SeqTrainer(
        model=convert(T5ForConditionalGeneration(config)), args=args, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    assert trainer.predict(rows[:4]).predictions.shape[0] == 4
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


# ------------------------------------------------------------------------------------------------- distillation


def test_distillation_loss_is_the_formula():
    z, t, T = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64), 3.0
    p, q = (t / T).softmax(-1), (z / T).softmax(-1)
    expected = T**2 * (p * (p.log() - q.log())).sum(-1)
    assert distillation_loss(z, t, T).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    mask = torch.tensor([1, 0, 1, 1, 0, 0])
    assert distillation_loss(z, t, T, mask).item() == pytest.approx(expected[mask.bool()].mean().item(), rel=1e-5)


def test_distillation_pulls_the_student_to_the_teacher(tmp_path):
    teacher, rows = dense_bert(), text_data()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    distances = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        student = convert(copy.deepcopy(teacher), rank_ratio=0.1)
        args = arguments(tmp_path, num_train_epochs=6, distillation_weight=weight)
        trainer = CondLRTrainer(model=student, args=args, train_dataset=rows, teacher=teacher if weight else None)
        trainer.train()
        ids = torch.stack([row["input_ids"] for row in rows])
        with torch.no_grad():
            pairs = student.eval()(input_ids=ids).logits, teacher.eval()(input_ids=ids).logits
        distances[weight] = (pairs[0].softmax(-1) - pairs[1].softmax(-1)).abs().mean().item()
    assert distances[1.0] < 0.7 * distances[0.0]


def test_evaluation_loss_is_the_plain_one(tmp_path):
    teacher, rows = dense_bert(), text_data(8)
    args = arguments(tmp_path, distillation_weight=0.9)
    student = convert(copy.deepcopy(teacher))
    trainer = CondLRTrainer(model=student, args=args, train_dataset=rows, eval_dataset=rows, teacher=teacher)
    ids, labels = torch.stack([r["input_ids"] for r in rows]), torch.tensor([r["labels"] for r in rows])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(student.eval()(input_ids=ids).logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "field, value",
    [
        ("conditioning_warmup_ratio", 1.5),
        ("distillation_weight", 2.0),
        ("distillation_temperature", 0.0),
    ],
)
def test_arguments_are_checked(field, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"{field} must .*; received {value}"):
        arguments(tmp_path, **{field: value})


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_teacher_and_weight_belong_together(weight, tmp_path):
    teacher = dense_bert() if weight == 0 else None
    with pytest.raises(ConfigError, match="a teacher and distillation_weight > 0 belong together"):
        CondLRTrainer(
            model=convert(dense_bert()), args=arguments(tmp_path, distillation_weight=weight), teacher=teacher
        )


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
        "missing file": "must be there",
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


# ------------------------------------------------------------------------------------- projection every k-th step


class Watch(TrainerCallback):
    """Bounds in force, and the orthonormality error, whenever Trainer says what it has done."""

    def __init__(self):
        self.seen = {}

    def note(self, event, state, model):
        report = condition_report(model)
        finite = all(math.isfinite(layer.bound) for layer in report.layers)
        self.seen[event, state.global_step] = finite and report.max_orthonormality_error < 1e-5
        assert not finite or all(x.condition_number <= x.bound * (1 + 1e-4) for x in report.layers)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.note("step", state, model)

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.note("evaluate", state, model)

    def on_save(self, args, state, control, model, **kwargs):
        self.note("save", state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.note("end", state, model)


INTERVAL = {"projection_interval": 4, "learning_rate": 3e-2}


def test_the_model_is_settled_where_it_is_looked_at(tmp_path):
    args = arguments(tmp_path, **INTERVAL, save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=3)
    watch, rows = Watch(), text_data()
    model = convert(dense_bert())
    trainer = CondLRTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=[watch, StopAt(11)]
    )
    trainer.train()
    assert trainer.manifold_step.projection_interval == 4
    settled = {event for event, holds in watch.seen.items() if holds}
    steps = {("step", t) for t in range(1, 12)}
    looks = {("evaluate", t) for t in (3, 6, 9)} | {("save", 5), ("save", 10), ("end", 11)}
    assert looks <= settled and set(watch.seen) == steps | looks | {key for key in watch.seen if key[1] == 11}
    assert settled & steps == {("step", 4), ("step", 8)}
    for entry in trainer.state.log_history:
        assert math.isfinite(entry.get("kappa_max", 1.0)) and math.isfinite(entry.get("kappa_bound", 1.0))


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
    for checkpoint in (3, 6):
        resumed = CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
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


def test_projection_interval_of_the_arguments_must_count(tmp_path):
    with pytest.raises(ConfigError, match="projection_interval must be an integer ≥ 1; received 0"):
        arguments(tmp_path, projection_interval=0)
