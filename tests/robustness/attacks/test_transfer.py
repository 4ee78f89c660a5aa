"""`Transfer`: examples made on one model and evaluated on another."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import (
    FGSM,
    L2FGSM,
    PGD,
    CharacterAttack,
    Corruption,
    EmbeddingPGD,
    PixelModel,
    Transfer,
)
from tests import classifiers


@pytest.fixture(scope="module")
def source():
    """Another architecture, trained on the same digits, with another normalisation."""
    pixels, labels = classifiers.digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inner = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 10)
        )
        model = PixelModel(inner, 0.5, 0.25)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(8):
            for index in torch.randperm(len(labels) - 300).split(128):
                optimizer.zero_grad()
                F.cross_entropy(model(pixels[index]), labels[index]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return model


def correct(model, pixels, labels):
    with torch.no_grad():
        return model.eval()(pixels).argmax(1) == labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_attack_on_the_source_where_the_model_is_right(source, norm):
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out(300)
    inner = PGD({"linf": 0.15, "l2": 1.0}[norm], norm)
    attack = Transfer(inner, source)
    assert not attack.attack.early_stop and inner.early_stop
    adversarial = attack(model, pixels, labels)
    right = correct(model, pixels, labels)
    assert 0 < (~right).sum() < 60
    crafted = PGD(inner.epsilon, norm, early_stop=False)(source, pixels, labels)
    assert torch.equal(adversarial[right], crafted[right])
    assert torch.equal(adversarial[~right], pixels[~right])
    assert not correct(model, adversarial, labels)[~right].any()


def test_going_on_after_the_source_is_fooled_transfers_better(source):
    """Of 300 digits, measured: 277 clean, 195 after stopping, 128 after going on, 63 under the attack on the model."""
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out(300)
    right = correct(model, pixels, labels)
    stopping = PGD(0.15)(source, pixels, labels)
    stopped = (correct(model, stopping, labels) & right).sum().item()
    going_on = correct(model, Transfer(PGD(0.15), source)(model, pixels, labels), labels).sum().item()
    white_box = correct(model, PGD(0.15)(model, pixels, labels), labels).sum().item()
    assert white_box < going_on < stopped - 15
    assert stopped < right.sum()


def test_an_attack_without_early_stop_is_taken_as_it_is(source):
    for inner in (FGSM(0.1), PGD(0.1, early_stop=False)):
        assert Transfer(inner, source).attack is inner


def test_both_models_are_left_as_they_were(source):
    model, (pixels, labels) = classifiers.pixel_mlp().train(), classifiers.held_out(8)
    source.train()
    state = torch.get_rng_state()
    adversarial = Transfer(PGD(0.1), source)(model, pixels, labels)
    assert torch.equal(torch.get_rng_state(), state)
    for each in (model, source):
        assert all(module.training for module in each.modules())
        assert all(parameter.grad is None for parameter in each.parameters())
    assert torch.equal(Transfer(PGD(0.1), source)(model, pixels, labels), adversarial)  # no dropout
    half = Transfer(FGSM(0.1), source)(model, pixels.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_name_budget_seed_and_settings_are_those_of_the_attack(source):
    attack = Transfer(PGD(0.1, "l2", seed=3), source)
    assert (attack.name, attack.threat, attack.epsilon) == ("transfer-pgd-l2", "l2", 0.1)
    assert (attack.takes, attack.within_bounds, attack.adversarial) == ("pixels", True, True)
    assert not Transfer(L2FGSM(0.1), source).within_bounds
    other = attack.with_epsilon(0.2).reseeded(2)
    assert other.source is source and other.epsilon == 0.2
    assert other.attack == PGD(0.2, "l2", seed=3, early_stop=False).reseeded(2) != attack.attack
    settings = json.loads(json.dumps(attack.settings()))
    expected = {"attack": "transfer-pgd-l2", "threat": "l2", "source": "Sequential", "epsilon": 0.1, "seed": 3}
    assert expected.items() <= settings.items() and settings["early_stop"] is False
    assert Transfer(PGD(0.1), classifiers.pixel_mlp()).settings()["source"] == "digits-mlp"


def test_the_distance_is_in_the_normalised_units_of_the_source(source):
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out(50)
    attack = Transfer(L2FGSM(0.3), source)
    adversarial = attack(model, pixels, labels)
    size = attack.distance(model, pixels, adversarial)[correct(model, pixels, labels)]
    torch.testing.assert_close(size, torch.full_like(size, 0.3), rtol=0, atol=1e-5)


class Shout(nn.Module):
    """Class 1 where a text ends with a mark; takes lists."""

    def __init__(self, mark):
        super().__init__()
        self.mark, self.anchor = mark, nn.Parameter(torch.zeros(()))

    def forward(self, texts):
        return torch.tensor([[0.0, 1.0] if text.endswith(self.mark) else [1.0, 0.0] for text in texts]) + self.anchor


def test_texts_that_the_model_gets_wrong_stay_as_they_are():
    class Append(CharacterAttack):
        def __call__(self, model, inputs, labels):
            return [text + "?" for text in inputs]

    adversarial = Transfer(Append(0.1), Shout("?"))(Shout("!"), ["a!", "b", "c!"], torch.tensor([1, 1, 1]))
    assert adversarial == ["a!?", "b", "c!?"]


def test_errors(source):
    with pytest.raises(AttackError, match="attack must change pixels or texts; received pgd-embedding"):
        Transfer(EmbeddingPGD(0.1), source)
    with pytest.raises(AttackError, match="attack must be adversarial; received jpeg"):
        Transfer(Corruption("jpeg", 1), source)
