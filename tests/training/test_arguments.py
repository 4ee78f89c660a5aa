"""Arguments of the Trainer and of adversarial training: checked, and given on the command line."""

import pytest
from transformers import HfArgumentParser

from hf_condlr import AdversarialArguments
from hf_condlr.errors import AttackError, ConfigError
from tests.training.tiny import arguments
from tests.training.tiny_images import FGSM, PGD_


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


def test_evaluation_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="bf16_full_eval must be off"):
        arguments(tmp_path, bf16_full_eval=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adversarial_attack": "cw"}, "adversarial_attack must be none, fgsm or pgd; received cw"),
        ({"adversarial_epsilon": 0.1}, "adversarial_epsilon must be left alone without an attack; received 0.1"),
        ({"adversarial_share": 0.5}, "adversarial_share must be left alone without an attack; received 0.5"),
        ({"trades_beta": 1.0}, "trades_beta must be left alone without an attack; received 1.0"),
        (FGSM | {"adversarial_epsilon": None}, "adversarial_epsilon must be given with fgsm; received None"),
        (FGSM | {"adversarial_epsilon": 0.0}, "adversarial_epsilon must be > 0 and finite; received 0.0"),
        (FGSM | {"adversarial_epsilon": "8/0"}, "epsilon must be a number or a fraction; received '8/0'"),
        (FGSM | {"adversarial_norm": "l2"}, "adversarial_norm must be linf with fgsm; received l2"),
        (PGD_ | {"adversarial_norm": "l1"}, "adversarial_norm must be linf or l2; received l1"),
        (PGD_ | {"adversarial_steps": 0}, "adversarial_steps must be ≥ 1; received 0"),
        (FGSM | {"adversarial_steps": 3}, "adversarial_steps must be left alone with fgsm, which is one; received 3"),
        (FGSM | {"adversarial_share": 0.0}, r"adversarial_share must lie in \(0, 1\]; received 0.0"),
        (FGSM | {"adversarial_share": 1.5}, r"adversarial_share must lie in \(0, 1\]; received 1.5"),
        (FGSM | {"adversarial_schedule": "cosine"}, "adversarial_schedule must be ramp or constant; received cosine"),
        (PGD_ | {"trades_beta": -1.0}, "trades_beta must be ≥ 0 and finite; received -1.0"),
        (FGSM | {"trades_beta": 1.0}, "trades_beta must be 0 with fgsm; received 1.0. At x itself"),
        (PGD_ | {"trades_beta": 1.0, "adversarial_share": 0.5}, "adversarial_share must be 1 with TRADES"),
        (FGSM | {"adversarial_image_mean": [0.5]}, "adversarial_image_std must be given with the mean, or neither"),
        (
            FGSM | {"adversarial_image_mean": [0.5], "adversarial_image_std": [0.0]},
            r"adversarial_image_std must be > 0; received \[0.0\]",
        ),
    ],
)
def test_adversarial_arguments_are_checked(options, message, tmp_path):
    with pytest.raises((ConfigError, AttackError), match=message):
        AdversarialArguments(**options)
    with pytest.raises((ConfigError, AttackError), match=message):
        arguments(tmp_path, **options)


def test_arguments_on_the_command_line():
    words = "--adversarial_attack pgd --adversarial_epsilon 8/255 --adversarial_image_mean 0.5 0.4 0.3"
    words += " --adversarial_image_std 1 1 1 --adversarial_norm l2 --adversarial_steps 3 --trades_beta 6"
    (parsed,) = HfArgumentParser(AdversarialArguments).parse_args_into_dataclasses(words.split())
    assert parsed.adversarial_epsilon == pytest.approx(8 / 255)
    assert parsed.adversarial_image_mean == [0.5, 0.4, 0.3]
    assert (parsed.adversarial_norm, parsed.adversarial_steps, parsed.trades_beta) == ("l2", 3, 6.0)
