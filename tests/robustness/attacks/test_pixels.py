"""PixelModel: normalisation inside the attacked model, ε in pixels."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_condlr.robustness.attacks import FGSM, PGD, PixelModel
from tests.robustness.attacks.problems import EPSILON, Linear, cross_entropy, perturbation

ATTACKS = [FGSM(EPSILON), FGSM(EPSILON, norm="l2"), PGD(EPSILON), PGD(EPSILON, "l2")]

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def test_pixel_model_normalises_each_channel():
    inner = Linear(torch.randn(3, 12), torch.randn(3))
    pixels = torch.rand(4, 3, 2, 2)
    expected = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(PixelModel(inner, MEAN, STD)(pixels), inner(expected))
    torch.testing.assert_close(PixelModel(inner, 0.5, 0.25)(pixels), inner((pixels - 0.5) / 0.25))
    torch.testing.assert_close(PixelModel(inner)(pixels), inner(pixels))
    assert set(PixelModel(inner, MEAN, STD).state_dict()) == {"model.linear.weight", "model.linear.bias"}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_pixel_model_measures_the_radius_in_pixels(attack):
    """For FGSM: a pixel step ε sign(g) is the step ε sign(g)/σ of normalised inputs."""
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)) / 8
    inner, labels = Linear(weight, torch.tensor([3.0, 0.0])), torch.zeros(4, dtype=torch.long)
    model = PixelModel(inner, MEAN, STD)
    pixels = 0.3 + 0.4 * torch.rand(4, 3, 2, 2)
    adversarial = attack(model, pixels, labels)
    size = perturbation(adversarial, pixels, attack.norm)
    torch.testing.assert_close(size, torch.full_like(size, EPSILON), rtol=1e-3, atol=0)
    if attack.norm == "linf":
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        step = EPSILON * (weight[1] - weight[0]).sign().reshape(3, 2, 2) / std
        torch.testing.assert_close((adversarial - mean) / std, (pixels - mean) / std + step, rtol=0, atol=2e-6)


class Output(nn.Module):
    """A model of transformers' kind."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return ImageClassifierOutput(logits=self.model(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap", [lambda model: model, Output], ids=["tensor", "output"])
def test_pixel_model_gives_float32_logits(dtype, wrap):
    inner = wrap(Linear(torch.randn(3, 12), torch.randn(3))).to(dtype)
    model = PixelModel(inner, MEAN, STD)
    pixels, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    logits = model(pixels)
    assert isinstance(logits, torch.Tensor) and logits.dtype == torch.float32
    assert model(pixels.to(torch.bfloat16)).dtype == torch.float32
    assert {parameter.dtype for parameter in inner.parameters()} == {dtype}
    for attack in ATTACKS:
        adversarial = attack(model, pixels, labels)
        assert adversarial.dtype == torch.float32 and not torch.equal(adversarial, pixels)


def test_pixel_model_of_a_transformer_is_attacked():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = PixelModel(ViTForImageClassification(config).train(), MEAN, STD)
    pixels, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    adversarial = PGD(EPSILON, steps=3, early_stop=False)(model, pixels, labels)
    assert model.model.training
    model.eval()
    assert (cross_entropy(model, adversarial, labels) > cross_entropy(model, pixels, labels)).all()
