"""What every attack on images keeps to: the model, the inputs and all random states stay as they were."""

import json

import pytest
import torch

from hf_condlr.robustness.attacks import L2FGSM, AutoAttack, Jitter, Square
from tests.robustness.attacks.test_gradient import Watched, random_states

pytest.importorskip("pyautoattack")


class WatchedImages(Watched):
    """For images of 6 × 1 pixels; asserts at each call that it is in evaluation mode and sees float32."""

    def forward(self, x):
        assert x.dtype == torch.float32
        return super().forward(x.flatten(1))


ATTACKS = {
    "l2-fgsm": lambda epsilon=0.3, **options: L2FGSM(epsilon, clip=True, **options),
    "jitter": lambda epsilon=0.3, **options: Jitter(epsilon, clip=True, **options),
    "square-linf": lambda epsilon=0.3, **options: Square(epsilon, queries=20, **options),
    "square-l2": lambda epsilon=0.3, **options: Square(epsilon, "l2", queries=20, **options),
    "autoattack-linf": lambda epsilon=0.3, **options: AutoAttack(epsilon, attacks=("apgd-ce", "fab"), **options),
    "autoattack-l2": lambda epsilon=0.3, **options: AutoAttack(epsilon, "l2", attacks=("apgd-ce", "fab"), **options),
}
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
    adversarial = attack()(model, images, labels)
    assert random_states() == random_before and model.state() == before
    assert torch.equal(images, inputs) and not torch.equal(adversarial, images)
    assert not adversarial.requires_grad and adversarial.dtype == torch.float32
    torch.rand(7)
    assert torch.equal(attack()(model, images, labels), adversarial)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # as evaluation loops do
        assert torch.equal(attack()(model, images, labels), adversarial)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    learning = images.clone().requires_grad_(True)
    adversarial = attack()(model, learning, labels)
    assert not adversarial.requires_grad and learning.requires_grad and learning.grad is None


@each_attack
def test_the_model_is_left_as_it_was_when_it_raises(batch, attack):
    model, images, labels = batch
    before, random_before = model.state(), random_states()
    for model.fails_at in (1, 4) if "l2-fgsm" not in attack().name else (1,):
        model.calls = 0
        with pytest.raises(RuntimeError, match="the model broke"):
            attack()(model, images, labels)
        assert model.calls == model.fails_at
        assert model.state() == before and random_states() == random_before


@each_attack
def test_no_budget_no_change(batch, attack):
    model, images, labels = batch
    for dtype in (torch.float32, torch.bfloat16):
        inputs = images.to(dtype)
        assert torch.equal(attack(epsilon=0.0)(model, inputs, labels), inputs.float())


@each_attack
def test_results_lie_in_the_ball_and_the_bounds(batch, attack):
    model, images, labels = batch
    images[0] = 0.0
    images[1] = 1.0
    for epsilon in (0.01, 0.3, 5.0):
        made = attack(epsilon=epsilon)
        adversarial = made(model, images, labels)
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        assert (made.distance(model, images, adversarial) <= epsilon * (1 + 1e-6) + 2e-7).all()


@each_attack
def test_settings_are_json_and_make_the_attack_again(attack):
    made = attack()
    settings = json.loads(json.dumps(made.settings()))
    assert (settings.pop("attack"), settings.pop("threat")) == (made.name, made.threat)
    settings["bounds"] = tuple(settings["bounds"])
    assert type(made)(**settings) == made
    assert made.with_epsilon(0.7).epsilon == 0.7
    assert (made.reseeded(2) != made) == hasattr(made, "seed")
