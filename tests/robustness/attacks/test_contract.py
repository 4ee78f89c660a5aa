"""What every attack on images keeps to: its ball and [0, 1], and the model, inputs and random states as they were."""

import importlib.util
import json

import pytest
import torch

from hf_condlr.robustness.attacks import FGSM, L2FGSM, PGD, AutoAttack, Jitter, Square
from tests.robustness.attacks.problems import Watched, random_states


class WatchedImages(Watched):
    """For images of 6 × 1 pixels; asserts at each call that it is in evaluation mode and sees float32."""

    def forward(self, x):
        assert x.dtype == torch.float32
        return super().forward(x.flatten(1))


ATTACKS = {
    "fgsm": FGSM(0.3),
    "fgm-l2": FGSM(0.3, norm="l2"),
    "pgd-linf": PGD(0.3),
    "pgd-l2": PGD(0.3, "l2"),
    "pgd-linf-margin": PGD(0.3, loss="margin", restarts=2),
    "pgd-l2-margin": PGD(0.3, "l2", loss="margin", restarts=2),
    "l2-fgsm": L2FGSM(0.3),
    "jitter": Jitter(0.3),
    "square-linf": Square(0.3, queries=20),
    "square-l2": Square(0.3, "l2", queries=20),
}
ONE_STEP = (FGSM, L2FGSM)
if importlib.util.find_spec("pyautoattack"):
    for norm in ("linf", "l2"):
        ATTACKS[f"autoattack-{norm}"] = AutoAttack(0.3, norm, attacks=("apgd-ce", "fab"))
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture
def batch():
    """A model, 16 images, and its own answers but for two."""
    model, images = WatchedImages(), torch.rand(16, 1, 6, 1)
    with torch.no_grad():
        logits = model.eval()(images)
        model.head.bias[0] -= (logits[:, 0] - logits[:, 1]).median()  # near the border of both classes
        labels = model(images).argmax(1)
    model.calls = 0
    model.train().frozen.eval()
    return model, images, torch.cat([1 - labels[:2], labels[2:]])


@each_attack
def test_model_inputs_and_random_states_are_left_as_they_were(batch, attack):
    model, images, labels = batch
    before, inputs, random_before = model.state(), images.clone(), random_states()
    adversarial = attack(model, images, labels)
    assert random_states() == random_before and model.state() == before
    assert torch.equal(images, inputs) and not torch.equal(adversarial, images)
    assert not adversarial.requires_grad and adversarial.dtype == torch.float32
    torch.rand(7)
    assert torch.equal(attack(model, images, labels), adversarial)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # as evaluation loops do
        assert torch.equal(attack(model, images, labels), adversarial)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    learning = images.clone().requires_grad_(True)
    adversarial = attack(model, learning, labels)
    assert not adversarial.requires_grad and learning.requires_grad and learning.grad is None


@each_attack
def test_the_model_is_left_as_it_was_when_it_raises(batch, attack):
    model, images, labels = batch
    before, random_before = model.state(), random_states()
    for model.fails_at in (1,) if isinstance(attack, ONE_STEP) else (1, 4):
        model.calls = 0
        with pytest.raises(RuntimeError, match="the model broke"):
            attack(model, images, labels)
        assert model.calls == model.fails_at
        assert model.state() == before and random_states() == random_before


@each_attack
def test_no_budget_no_change(batch, attack):
    model, images, labels = batch
    images[:3] = torch.tensor([0.0, 1.0, 1e-30]).reshape(3, 1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = images.to(dtype)
        assert torch.equal(attack.with_epsilon(0.0)(model, inputs, labels), inputs.float())


@each_attack
def test_results_lie_in_the_ball_and_the_bounds(batch, attack):
    model, images, labels = batch
    images[0] = 0.0
    images[1] = 1.0
    for epsilon in (1e-3, 0.3, 1.0):
        made = attack.with_epsilon(epsilon)
        adversarial = made(model, images, labels)
        assert adversarial.isfinite().all()
        assert not made.within_bounds or (adversarial.min() >= 0 and adversarial.max() <= 1)
        assert (made.distance(model, images, adversarial) <= epsilon * (1 + 1e-6) + 2e-7).all()


@each_attack
def test_settings_are_json_and_make_the_attack_again(batch, attack):
    settings = json.loads(json.dumps(attack.settings()))
    assert (settings.pop("attack"), settings.pop("threat")) == (attack.name, attack.threat)
    assert type(attack)(**settings) == attack and attack.with_epsilon(0.7).epsilon == 0.7
    assert (attack.reseeded(2) != attack) == hasattr(attack, "seed")
    if hasattr(attack, "seed") and not isinstance(attack, AutoAttack):
        assert not torch.equal(attack.reseeded(2)(*batch), attack(*batch))
