"""Checks by further attacks: each has an evaluation made to fail it."""

import torch
from torch import nn

from hf_condlr.robustness.attacks import PGD, TextModel
from hf_condlr.robustness.evaluation import AttackResult
from hf_condlr.robustness.evaluation.attack_checks import CheckBatch, CheckedCase
from tests import classifiers, text_models
from tests.robustness.evaluation.evaluation import checked, fails


def test_an_attack_that_is_badly_set():
    _, checks = checked(classifiers.pixel_mlp(), [PGD(16 / 255, steps=20, step_size=1e-5)])
    failing = {"no weaker than one step", "converged", "margin loss finds no more", "no gradient masking"}
    assert failing <= fails(checks)
    assert not {"no change at ε = 0", "gradients are not zero", "nothing survives a huge ε"} & fails(checks)


class Wavy(nn.Module):
    """A loss with many local maxima: one step, and few, end in the wrong one."""

    def __init__(self):
        super().__init__()
        self.inner = classifiers.pixel_mlp()

    def forward(self, x):
        return self.inner(x) + 1.5 * (60 * x).sin().flatten(1).sum(1, keepdim=True) * torch.linspace(-1, 1, 10)


def test_too_few_steps_have_not_converged():
    _, checks = checked(Wavy(), [PGD(16 / 255, steps=1)])
    assert "converged" in fails(checks)


def test_texts_without_an_editable_token_have_no_gradient_to_be_zero():
    model = TextModel(*text_models.trained_reviewer())
    batch = CheckBatch([0, 1, 2], ["", "the film was good", "a poor plot"], torch.tensor([0, 1, 0]))
    case = AttackResult("worst case", "embedding", 0.1, [True] * 3)
    assert CheckedCase(model, [batch], case, [True] * 3, steps=1).unmoved() == (0, 2)
