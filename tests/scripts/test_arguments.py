"""`ModelArguments` and `AttackArguments`: what they make, and what they refuse before anything is loaded."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_condlr import AttackArguments, ModelArguments, get_robust_lowrank_model, trainer_class
from hf_condlr.layers import factored_layers
from tests.text_models import classifier

METHODS = ("dense", "lowrank", "condlr")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "robust"}, "method must be one of dense, lowrank, condlr; received 'robust'"),
        ({"tau": -0.1}, "tau must be a number ≥ 0 or 'inf'; received -0.1"),
        ({"rank_ratio": 1.5}, "rank_ratio.*received 1.5"),
        ({"rank_ratio": 0.5, "compression_ratio": 0.5}, "exactly one of r, rank_ratio, compression_ratio"),
        ({"init_weights": "magic"}, "init_weights.*magic"),
        ({"exclude_modules": "("}, "exclude_modules must hold valid regexes"),
        ({"method": "dense", "teacher": "t"}, "a teacher needs method condlr; received 'dense'"),
        (
            {"model_type": "vit"},
            "exactly one of model_name_or_path and model_type must be given; received .*model_type",
        ),
        (
            {"model_name_or_path": None},
            r"exactly one of model_name_or_path and model_type must be given; received \[\]",
        ),
        ({"config_overrides": "a"}, "config_overrides needs model_type; received a"),
    ],
)
def test_a_wrong_model_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**{"model_name_or_path": "m"} | wrong)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("vitt", "{}", "model_type must be one that transformers has; received 'vitt'"),
        (
            "vit",
            "{hidden: 1}",
            r"config_overrides must be a mapping from fields of ViTConfig; received {'hidden': 1}\. ",
        ),
        ("vit", "{hidden_size:1}", "config_overrides must be a mapping from fields of ViTConfig"),
        ("vit", "hidden_size=1", "must be a mapping from fields of ViTConfig; received 'hidden_size=1'. Mind"),
    ],
)
def test_a_wrong_fresh_model(model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(model_type=model_type, config_overrides=overrides)


SMALL = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("deit", f"{{{SMALL}, image_size: 16, patch_size: 8}}"),
        ("resnet", "{embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}"),
    ],
)
def test_fresh_models_of_any_architecture(model_type, overrides):
    model = ModelArguments(model_type=model_type, config_overrides=overrides).load_model(
        AutoModelForImageClassification, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    assert model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape == (1, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_half_precision_file_is_trained_in_float32(tmp_path, method):
    classifier("Bert").bfloat16().save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path), method=method, rank_ratio=0.25, exclude_modules=r".*layer\.0\..*")
    model = args.load_model(AutoModelForSequenceClassification)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert args.converts(model) == (method != "dense")
    assert trainer_class(method).__name__ in ("DenseTrainer", "LowRankTrainer", "FactoredTrainer", "CondLRTrainer")


def test_a_factored_model_stays_as_it_is_and_is_not_trained_as_a_dense_one(caplog):
    model = copy.deepcopy(classifier("Bert"))
    args = ModelArguments("m", rank_ratio=0.25, exclude_modules=r".*layer\.0\..*")
    get_robust_lowrank_model(model, args.condlr_config())
    assert set(factored_layers(model)) and not any(".layer.0." in name for name in factored_layers(model))
    assert not args.converts(model) and "m is factored already and keeps its ranks" in caplog.text
    with pytest.raises(ValueError, match=r"method dense needs a dense model; received m\. Choose lowrank or condlr"):
        ModelArguments("m", method="dense").converts(model)


# ------------------------------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": ["0.1"]}, r"attacks and epsilons belong together; received \['epsilons'\] alone"),
        ({"attacks": ["fgsm"]}, r"attacks and epsilons belong together; received \['attacks'\] alone"),
        ({"attacks": ["fgsm"], "epsilons": ["-0.1"]}, "epsilon must be .*received -0.1"),
        ({"attacks": ["fgsm"], "epsilons": ["8:255"]}, "epsilon must be a number or a fraction; received '8:255'"),
        ({"attacks": ["pgd-l2"], "epsilons": ["1"], "attack_steps": 0}, "steps.*≥ 1.*received steps=0"),
        ({"attacks": ["magic"], "epsilons": ["1"]}, "attack must be one of .*received 'magic'"),
        ({"max_attack_samples": 0}, "max_attack_samples must be ≥ 1; received 0"),
    ],
)
def test_a_wrong_attack_argument(options, message):
    with pytest.raises(ValueError, match=message):
        AttackArguments(**options)


def test_attacks_must_be_for_the_data():
    args = AttackArguments(attacks=["pgd-linf", "fgsm"], epsilons=["2/255", "0.1"])
    assert [(a.name, round(a.epsilon, 3)) for a in args.make_attacks("pixels")][1:3] == [
        ("pgd-linf", 0.1),
        ("fgsm", 0.008),
    ]
    with pytest.raises(
        ValueError, match=r"attacks must be on tokens or texts; received pgd-linf, pgd-linf, fgsm, fgsm"
    ):
        args.make_attacks("tokens", "texts")
    assert AttackArguments().make_attacks("pixels") == []


def test_attacks_on_a_sharded_model_are_refused_before_training():
    def trainer(sharded, attack="none"):
        return SimpleNamespace(is_fsdp_enabled=sharded, args=SimpleNamespace(adversarial_attack=attack))

    some = AttackArguments(attacks=["fgsm"], epsilons=["0.1"])
    AttackArguments().require_unsharded(trainer(True))
    some.require_unsharded(trainer(False))
    with pytest.raises(ValueError, match=r"attacks need the full model on every process.*received fgsm"):
        some.require_unsharded(trainer(True))
    with pytest.raises(ValueError, match=r"received pgd. Leave the attacks out"):
        AttackArguments().require_unsharded(trainer(True, "pgd"))
