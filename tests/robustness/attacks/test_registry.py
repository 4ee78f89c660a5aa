"""Attacks by name: every name builds what it says, fractions are budgets, and wrong ones are refused."""

import json
from dataclasses import fields

import pytest

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import ATTACKS, FGSM, PGD, make_attack, make_attacks, parse_epsilon
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.corruptions import KINDS


@pytest.mark.parametrize("name", ATTACKS)
def test_a_name_builds_the_attack_of_that_name(name):
    attack = make_attack(name, 1)
    assert isinstance(attack, Attack) and attack.name == name and attack.epsilon == 1
    assert attack.threat and attack.takes in ("pixels", "tokens", "texts")
    settings = json.loads(json.dumps(attack.settings(), allow_nan=False))
    assert settings == attack.settings() and settings["attack"] == name
    assert {field.name for field in fields(attack)} <= set(settings)
    assert attack.with_epsilon(0).epsilon == 0 and type(attack.with_epsilon(0)) is type(attack)


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - KINDS.keys()))
def test_budgets_that_are_no_radius_are_refused(name):
    for epsilon in (-0.1, float("inf"), float("nan")):
        with pytest.raises(AttackError, match=f"epsilon must be finite and ≥ 0; received {epsilon}"):
            make_attack(name, epsilon)


def test_options_reach_the_attack():
    assert make_attack("pgd-l2-dlr", "8/255", steps=3, restarts=None) == PGD(8 / 255, "l2", steps=3, loss="dlr")
    attacks = make_attacks(["fgsm", "pgd-linf"], ["1/255", 0.5], steps=7)
    assert attacks == [FGSM(1 / 255), FGSM(0.5), PGD(1 / 255, steps=7), PGD(0.5, steps=7)]


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5/255", 0.5 / 255), ("1e-3", 1e-3), (2, 2.0)])
def test_budgets_are_numbers_or_fractions(text, value):
    assert parse_epsilon(text) == value


@pytest.mark.parametrize("value", ["8/0", "8:255", "", None, "1/2/3"])
def test_other_budgets_are_refused(value):
    with pytest.raises(AttackError, match="epsilon must be a number or a fraction; received"):
        parse_epsilon(value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_attack("pgd", 0.1), "attack must be one of fgsm, .*; received 'pgd'"),
        (lambda: make_attack("fgsm", 0.1, steps=3), "fgsm takes the options epsilon, clip, norm; received steps"),
        (lambda: make_attack("jpeg", "8/255"), "severity must be a whole number"),
        (lambda: make_attacks(["fgsm"], [0.1], steps=3), "one of fgsm must have each option; received steps"),
        (lambda: make_attack("pgd-linf", 4), "must be at most 1; received 4. .* give 4/255"),
        (lambda: make_attacks([], [0.1]), "at least one attack must be named"),
        (lambda: make_attacks(["fgsm"], []), "at least one epsilon must be given"),
        (lambda: make_attacks(["fgsm", "nothing"], [0.1]), "attack must be one of .*; received 'nothing'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(AttackError, match=message):
        call()
