"""RobustDLRT's ℓ2-FGSM and Jitter against their formulas in float64 NumPy, on linear models."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import L2FGSM, Jitter, PixelModel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
SHAPE, CLASSES, SAMPLES = (3, 4, 2), 4, 48


class DoublePixelModel(PixelModel):
    """In float64."""

    def normalize(self, pixels):
        return (pixels - self.mean) / self.std


def problem(seed, *, normalised=True):
    """A linear model of images, with or without normalisation, images and labels, most of them as predicted."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(24, CLASSES)
    linear.weight.data = torch.randn(CLASSES, 24, generator=generator) / 4
    linear.bias.data = torch.randn(CLASSES, generator=generator) / 4
    model = nn.Sequential(nn.Flatten(), linear)
    model = PixelModel(model, MEAN, STD) if normalised else model
    pixels = torch.rand(SAMPLES, *SHAPE, generator=generator)
    labels = model(pixels).argmax(1)
    labels[::6] = (labels[::6] + 1) % CLASSES
    return model, linear, pixels, labels


class Formulas:
    """A linear model on normalised inputs in float64; z of shape (B, 24)."""

    def __init__(self, linear, pixels, labels, *, normalised=True):
        self.weight, self.bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
        columns = [np.repeat(np.float32(values).astype(float), 8) for values in (MEAN, STD)]
        self.mean, self.std = columns if normalised else (np.zeros(24), np.ones(24))
        self.x = pixels.double().numpy().reshape(len(pixels), 24)
        self.z = (self.x - self.mean) / self.std
        self.onehot = np.eye(CLASSES)[labels.numpy()]
        self.labels = labels.numpy()

    def pixels(self, z):
        return (z * self.std + self.mean).reshape(-1, *SHAPE)

    def logits(self, z):
        return z @ self.weight.T + self.bias

    def cross_entropy_gradient(self):
        return (softmax(self.logits(self.z)) - self.onehot) @ self.weight

    def jitter_gradient(self, delta, noise, scale, deviation):
        """d/dδ of ‖p + deviation·noise − onehot‖², over ‖δ‖_∞ where misclassified, p = softmax(scale·a/‖a‖_∞)."""
        a = self.logits(self.z + delta)
        rows = np.arange(len(a))
        largest = np.abs(a).argmax(1)
        m = np.abs(a).max(1, keepdims=True)
        p = softmax(scale * a / m)
        difference = p + deviation * noise - self.onehot
        loss = (difference**2).sum(1)
        by_s = p * (2 * difference - (p * 2 * difference).sum(1, keepdims=True))
        by_a = scale / m * by_s
        by_a[rows, largest] -= (by_s * scale * a / m**2).sum(1) * np.sign(a[rows, largest])
        gradient = by_a @ self.weight
        r = np.abs(delta).max(1)
        divided = (a.argmax(1) != self.labels) & (r > 0)
        at_most = np.abs(delta) == r[:, None]
        by_delta = np.sign(delta) * at_most / at_most.sum(1, keepdims=True)  # of ‖δ‖_∞, shared where entries tie
        r = np.where(divided, r, 1.0)[:, None]
        return np.where(divided[:, None], gradient / r - loss[:, None] / r**2 * by_delta, gradient), divided


def softmax(a):
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def unit(g):
    return g / np.abs(g).max(1, keepdims=True)


def close(found, expected):
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
def test_l2_fgsm_is_a_gradient_step_whose_largest_entry_is_epsilon(seed, normalised, epsilon):
    model, linear, pixels, labels = problem(seed, normalised=normalised)
    formulas = Formulas(linear, pixels, labels, normalised=normalised)
    expected = formulas.pixels(formulas.z + epsilon * unit(formulas.cross_entropy_gradient()))
    attack = L2FGSM(epsilon)
    adversarial = attack(model, pixels, labels)
    close(adversarial, expected)  # measured: 3e-7
    close(attack.distance(model, pixels, adversarial), np.full(SAMPLES, epsilon))  # measured: 6e-7
    if epsilon > 0.1:
        assert expected.min() < 0 or expected.max() > 1


def climb(attack, formulas):
    """δ (B, 24) after the attack's iterations, and how often the loss of a sample was divided by ‖δ‖_∞."""
    generator = torch.Generator().manual_seed(attack.seed)
    delta, divisions = np.zeros((SAMPLES, 24)), 0
    for _ in range(attack.steps):
        noise = torch.randn(SAMPLES, CLASSES, generator=generator).double().numpy()
        gradient, divided = formulas.jitter_gradient(delta, noise, attack.scale, attack.noise)
        divisions += divided.sum()
        delta = np.clip(delta + attack.epsilon * unit(gradient), -attack.epsilon, attack.epsilon)
    return delta, divisions


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("options", [{}, {"steps": 1}, {"steps": 8, "scale": 3.0, "noise": 0.0}])
def test_jitter_climbs_its_loss(seed, normalised, options):
    """In float64: where softmax(10 ẑ/‖ẑ‖_∞) is near 0 and 1, a gradient in float32 has few digits left."""
    model, linear, pixels, labels = problem(seed, normalised=normalised)
    model = DoublePixelModel(model.model.double(), MEAN, STD) if normalised else model.double()
    attack = Jitter(0.4, seed=seed, **options)
    formulas = Formulas(linear, pixels, labels, normalised=normalised)
    delta, divisions = climb(attack, formulas)
    adversarial = attack(model, pixels.double(), labels)
    close(adversarial, formulas.pixels(formulas.z + delta))  # measured: 2e-13
    assert divisions > SAMPLES / 2 or attack.steps == 1
    assert (attack.distance(model, pixels, adversarial) <= attack.epsilon + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_jitter_of_float32_pixels(seed):
    """One step, with a scale at which float32 is enough."""
    model, linear, pixels, labels = problem(seed)
    attack = Jitter(0.4, seed=seed, steps=1, scale=1.0)
    formulas = Formulas(linear, pixels, labels)
    adversarial = attack(model, pixels, labels)
    assert adversarial.dtype == torch.float32
    close(adversarial, formulas.pixels(formulas.z + climb(attack, formulas)[0]))  # measured: 8e-8


def test_the_normalisation_is_found_inside_a_wrapper():
    """As DistributedDataParallel is one."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    model, _, pixels, labels = problem(0)
    for attack in (L2FGSM(0.3), Jitter(0.3)):
        adversarial = attack(model, pixels, labels)
        assert torch.equal(attack(Wrapper(model), pixels, labels), adversarial)
        assert torch.equal(
            attack.distance(Wrapper(model), pixels, adversarial), attack.distance(model, pixels, adversarial)
        )


def test_a_vanished_gradient_moves_nothing():
    model, linear, pixels, labels = problem(0)
    linear.weight.data.zero_()
    assert torch.equal(L2FGSM(0.3)(model, pixels, labels), pixels)
    assert torch.equal(Jitter(0.3)(model, pixels, labels)[1], pixels[1])  # classified correctly: no ‖δ‖ either


def test_errors():
    for attack in (L2FGSM, Jitter):
        with pytest.raises(AttackError, match=r"inputs must be pixels of \[0, 1\]"):
            attack(0.1)(problem(0)[0], torch.full((1, *SHAPE), 2.0), torch.zeros(1, dtype=torch.long))
    for options in ({"steps": 0}, {"scale": 0.0}, {"noise": -0.1}, {"scale": float("nan")}):
        with pytest.raises(AttackError, match="steps must be ≥ 1, scale > 0 and noise ≥ 0; received steps="):
            Jitter(0.1, **options)
