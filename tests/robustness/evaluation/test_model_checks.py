"""Checks of the model: each has a model made to fail it."""

import pytest
import torch
import torch.nn.functional as F

from hf_condlr.robustness.attacks import PixelModel
from tests import classifiers
from tests.robustness.evaluation.evaluation import checked, fails


class Wrapped(PixelModel):
    """The trained digits model, and something wrong with it."""

    def __init__(self):
        super().__init__(classifiers.mlp(), classifiers.MEAN, classifiers.STD)


class Softmax(Wrapped):
    def forward(self, pixels):
        return super().forward(pixels).softmax(1)


class Dropout(Wrapped):
    def forward(self, pixels):
        return super().forward(F.dropout(pixels, 0.3, training=True))


class Half(Wrapped):
    def forward(self, pixels):
        return super().forward(pixels).half()


class Quantised(Wrapped):
    """Shattered gradients: none passes the rounding."""

    def forward(self, pixels):
        return super().forward((pixels * 16).round() / 16)


class Counting(Wrapped):
    """Changes itself in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels):
        self.calls += 1
        return super().forward(pixels)


class NotFinite(Wrapped):
    def forward(self, pixels):
        logits = super().forward(pixels)
        return torch.where(logits == logits.amin(1, keepdim=True), -torch.inf, logits)


@pytest.mark.parametrize(
    ("model", "failing"),
    [
        (Softmax, {"outputs are logits"}),
        (Dropout, {"logits are repeatable"}),
        (NotFinite, {"logits are repeatable"}),
        (Half, {"float32 in the attack"}),
        (Counting, {"the attacked model is the model"}),
        (Quantised, {"gradients are not zero", "no gradient masking", "nothing survives a huge ε"}),
        (
            lambda: classifiers.pixel_mlp(scale=300.0),
            {"margin loss finds no more", "gradients are not zero", "no gradient masking"},
        ),
    ],
)
def test_a_model_made_to_fail(model, failing):
    _, checks = checked(model())
    assert failing <= fails(checks), checks


def test_another_normalisation_than_the_models_own():
    wrong = PixelModel(classifiers.mlp(), classifiers.MEAN, 1.2 * classifiers.STD)
    _, checks = checked(wrong, dataset=classifiers.images(), processor=classifiers.processor())
    assert fails(checks) == {"the attacked model is the model"}
    assert "logits differ by" in checks["the attacked model is the model"].found


@pytest.mark.parametrize("flat", [0.004, 0.996])
def test_pixels_that_are_all_black_or_white(flat):
    """As images of another range are when they are read as 8 bits."""
    pixels = (torch.rand(64, 1, 8, 8) < flat).float()
    _, checks = checked(classifiers.pixel_mlp(), dataset=torch.utils.data.TensorDataset(pixels, torch.arange(64) % 10))
    assert "pixels are spread as the processor expects" in fails(checks)


class Undecided(Wrapped):
    """Answers at random where nothing changes, as a defence that is drawn anew might."""

    def forward(self, pixels):
        logits = super().forward(pixels)
        return torch.where(torch.rand(len(logits), 1) < 0.2, -logits, logits)


def test_answers_at_random_change_at_epsilon_zero():
    _, checks = checked(Undecided())
    assert {"no change at ε = 0", "logits are repeatable"} <= fails(checks)
