"""Robust accuracy in the Trainer's evaluations: the metrics, where they go, and what they leave alone."""

import copy

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import HfArgumentParser, ViTImageProcessorPil

from hf_condlr import CondLRTrainer, FactoredTrainer, RobustnessArguments, evaluate_robustness, to_dense_model
from hf_condlr.errors import AttackError, ConfigError, EvaluationError
from hf_condlr.robustness.attacks import FGSM, PGD
from hf_condlr.training.robust_evaluation import robust_metrics
from tests.training.tiny import arguments, assert_equal_weights, convert, dense_bert, dense_vit, text_data
from tests.training.tiny_images import MEAN, STD, image_rows, rows_with_weak_features

ROBUSTNESS = {"attacks": ["fgsm", "pgd-linf"], "epsilons": ["1/64", "0.0625"], "steps": 3}
KEYS = ["accuracy_fgsm_0.015625", "accuracy_fgsm_0.0625", "accuracy_pgd_linf_0.015625", "accuracy_pgd_linf_0.0625"]


@pytest.fixture
def make(tmp_path):
    """A trainer of a tiny ViT on images, whose `args` are the options."""

    def make(cls=CondLRTrainer, robustness=None, model=None, rows=None, **options):
        rows = image_rows() if rows is None else rows
        return cls(
            model=convert(dense_vit()) if model is None else model,
            args=arguments(tmp_path, **options),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=ViTImageProcessorPil(image_mean=[MEAN], image_std=[STD]),
            **{} if robustness is None else {"robustness": RobustnessArguments(**robustness)},
        )

    return make


def test_evaluate_has_the_accuracies_of_an_evaluation_of_robustness(make):
    rows, settings = rows_with_weak_features(64), {"num_train_epochs": 8, "learning_rate": 1e-2}
    trainer = make(robustness=ROBUSTNESS | {"max_samples": 30}, rows=rows, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    attacks = [attack(epsilon) for attack in (FGSM, lambda e: PGD(e, steps=3)) for epsilon in (1 / 64, 1 / 16)]
    settings = {
        "processor": trainer.processing_class,
        "max_samples": 30,
        "batch_size": 8,
        "checks": False,
        "progress": False,
    }
    report = evaluate_robustness(trainer.model, rows, attacks, **settings)
    assert metrics["eval_robust_accuracy"] == report.robust_accuracy < report.clean_accuracy
    assert [metrics[f"eval_{key}"] for key in KEYS] == [attack.robust_accuracy for attack in report.attacks]
    assert metrics["eval_robust_samples"] == 30
    assert trainer.state.log_history[-1]["eval_robust_accuracy"] == report.robust_accuracy


def test_prediction_and_evaluation_without_being_asked_attack_nothing(make, monkeypatch):
    monkeypatch.setattr(
        "hf_condlr.training.robust_evaluation.evaluate_robustness", lambda *a, **k: pytest.fail("attacked")
    )
    assert not any("robust" in key for key in make(robustness=ROBUSTNESS).predict(image_rows(8)).metrics)
    assert not any("robust" in key for key in make().evaluate())


def test_each_of_several_data_sets_has_its_prefix(make):
    trainer = make(robustness={"epsilons": ["0.05"], "steps": 1, "max_samples": None})
    metrics = trainer.evaluate({"a": image_rows(8), "b": image_rows(12)}, metric_key_prefix="test")
    assert (metrics["test_a_robust_samples"], metrics["test_b_robust_samples"]) == (8, 12)
    assert {"test_a_accuracy_pgd_linf_0.05", "test_b_robust_accuracy"} <= set(metrics)


def test_training_is_the_same_with_it(make):
    dense, rows, models = dense_vit(), image_rows(), []
    for robustness in (None, ROBUSTNESS):
        models.append(convert(copy.deepcopy(dense)))
        make(robustness=robustness, model=models[-1], rows=rows, eval_strategy="epoch").train()
    assert_equal_weights(*models)


def test_the_attack_is_in_float32_in_a_training_in_bf16(make):
    trainer, seen = make(robustness=ROBUSTNESS, bf16=True, max_steps=2), []
    trainer.train()
    hook = trainer.model.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    robust_metrics(trainer, trainer.eval_dataset, trainer.robustness)
    hook.remove()
    assert set(seen) == {torch.float32}


def test_texts(tmp_path):
    robustness = RobustnessArguments(attacks=["pgd-embedding"], epsilons=["0.5"], steps=2)
    model, rows = convert(dense_bert()), text_data(20)
    trainer = CondLRTrainer(model=model, args=arguments(tmp_path), eval_dataset=rows, robustness=robustness)
    metrics = trainer.evaluate()
    assert metrics["eval_robust_accuracy"] == metrics["eval_accuracy_pgd_embedding_0.5"] < 1
    assert metrics["eval_robust_samples"] == 20


def test_data_that_cannot_be_attacked_are_refused_before_training(tmp_path):
    options = {"args": arguments(tmp_path), "robustness": RobustnessArguments(epsilons=["0.1"])}
    for dataset in (image_rows(), {"a": image_rows()}):
        with pytest.raises(
            EvaluationError, match="their normalisation must be known; received pixel_values and no image"
        ):
            CondLRTrainer(model=convert(dense_vit()), eval_dataset=dataset, **options)
    CondLRTrainer(model=convert(dense_vit()), **options)  # nothing is known of the data yet


def test_robust_accuracy_chooses_the_best_model_whose_attacks_go_into_the_card(make, tmp_path, monkeypatch):
    """The second of three evaluations is the best; the card has its numbers, not those of the last."""
    scores = iter([0.25, 0.75, 0.5, 0.125])

    def evaluation(model, dataset, attacks, **kwargs):
        report = evaluate_robustness(model, dataset, attacks, **kwargs)
        score = next(scores)
        report.correct = [True] * 48
        for attack in report.attacks:
            attack.survived = [i < score * 48 for i in range(48)]
        return report

    monkeypatch.setattr("hf_condlr.training.robust_evaluation.evaluate_robustness", evaluation)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_robust_accuracy", "greater_is_better": True}
    strategies = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3}
    trainer = make(robustness=ROBUSTNESS, conditioning_warmup_ratio=0.0, **best, **strategies)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.75, 12)

    def card(**kwargs):
        trainer.create_model_card(**kwargs)
        results = ModelCard.load(tmp_path / "README.md").data.eval_results
        assert not any(result.metric_name.startswith(("accuracy_", "robust_")) for result in results)
        return [(r.dataset_name, r.metric_args, r.metric_value) for r in results if r.metric_type == "robust_accuracy"]

    expected = [{"epsilon": epsilon, "samples": 48} for epsilon in (1 / 64, 1 / 16)]
    expected += [{"epsilon": epsilon, "steps": 3, "restarts": 1, "samples": 48} for epsilon in (1 / 64, 1 / 16)]
    assert card(dataset="digits") == [("digits", parameters, 0.75) for parameters in expected]
    trainer.evaluate()  # of the best model, now
    assert [value for *_, value in card()] == [0.125] * 4
    given = {"attack": "mine", "accuracy": 0.3}
    assert [value for *_, value in card(robustness=[given])] == [0.3]
    to_dense_model(trainer.model)
    trainer.create_model_card()  # Trainer's own, which knows no attacks


@pytest.mark.parametrize("dense", [False, True])
def test_weights_that_train_freely_are_attacked_too(make, dense):
    model = dense_vit() if dense else None
    assert "eval_robust_accuracy" in make(FactoredTrainer, robustness=ROBUSTNESS, model=model).evaluate()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attacks": ["pgd"]}, "attack must be one of fgsm.*received 'pgd'"),
        ({"attacks": []}, "at least one attack must be named"),
        ({"epsilons": []}, "at least one epsilon must be given"),
        ({"epsilons": ["much"]}, "epsilon must be a number or a fraction; received 'much'"),
        ({"epsilons": ["-1/255"]}, "epsilon must be finite and ≥ 0"),
        ({"steps": 0}, "steps and restarts must be ≥ 1; received steps=0"),
        ({"restarts": 0}, "steps and restarts must be ≥ 1; received steps=10, restarts=0"),
        ({"attacks": ["fgsm"], "steps": 3}, "must have each option; received steps"),
        ({"max_samples": 0}, "max_samples must be ≥ 1; received 0"),
        ({"batch_size": 0}, "batch_size must be ≥ 1; received 0"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises((ConfigError, AttackError), match=message):
        RobustnessArguments(**options)


def test_arguments_on_the_command_line():
    words = "--attacks pgd-l2 fgsm --epsilons 8/255 0.5 --steps 4 --max_samples 10 --batch_size 5"
    (parsed,) = HfArgumentParser(RobustnessArguments).parse_args_into_dataclasses(words.split())
    built = [(attack.name, attack.epsilon) for attack in parsed.build()]
    assert built == [(name, epsilon) for name in ("pgd-l2", "fgsm") for epsilon in (8 / 255, 0.5)]
    assert (parsed.max_samples, parsed.batch_size, parsed.restarts) == (10, 5, None)


def test_options_reach_the_evaluation(make, monkeypatch):
    seen = {}

    def evaluation(model, dataset, attacks, **kwargs):
        seen.update(kwargs, attacks=attacks)
        return evaluate_robustness(model, dataset, attacks, **kwargs)

    monkeypatch.setattr("hf_condlr.training.robust_evaluation.evaluate_robustness", evaluation)
    make(robustness={"steps": 2, "restarts": 3, "max_samples": 7, "batch_size": 5}).evaluate()
    assert (seen["max_samples"], seen["batch_size"]) == (7, 5)
    assert seen["attacks"] == [PGD(8 / 255, steps=2, restarts=3)]
    make(robustness={}).evaluate()
    assert (seen["max_samples"], seen["batch_size"]) == (256, 8)
