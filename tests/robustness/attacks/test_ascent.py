"""Gradient ascent: the worst iterate is kept, restarts, and gradients that lead nowhere."""

import itertools

import pytest
import torch
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import FGSM, PGD, EmbeddingPGD
from tests.robustness.attacks.problems import EPSILON, Flat, cross_entropy


class Valley(nn.Module):
    """Wrong at the middle, right a little further out: a random start would correct the error."""

    def forward(self, x):
        return torch.stack([(x - 0.5).abs().sum(1) - 1e-3, 0 * x.sum(1)], 1)


def test_an_attack_never_corrects_an_error():
    x, labels = torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.long)
    adversarial = PGD(0.1, steps=2)(Valley(), x, labels)
    assert (Valley()(adversarial).argmax(1) != labels).all()


class Undefined(nn.Module):
    """0 · ∞ in the gradient of every sample, not in the logits."""

    def forward(self, x):
        return torch.stack([x.sum(1) + 5, (x - x.detach()).abs().sqrt().sum(1)], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_moves_nothing(norm):
    x, labels = torch.full((4, 2), 0.5), torch.zeros(4, dtype=torch.long)
    gradient = torch.autograd.grad(Undefined()(x.requires_grad_(True)).sum(), x)[0]
    assert not gradient.isfinite().any()
    for attack in (FGSM(0.1, norm=norm), PGD(0.1, norm, early_stop=False)):
        assert attack(Undefined(), x, labels).isfinite().all()
    assert torch.equal(FGSM(0.1, norm=norm)(Undefined(), x, labels), x.detach())


def test_restarts_begin_elsewhere():
    seen = []

    class Watch(Flat):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    inputs = torch.full((2, 4), 0.5)
    PGD(EPSILON, steps=2, restarts=3)(Watch(), inputs, torch.zeros(2, dtype=torch.long))
    starts = {tuple(x.flatten().tolist()) for x in seen} - {tuple(inputs.flatten().tolist())}
    assert len(starts) == 3


def test_more_restarts_only_help(trained):
    model, x, labels = trained
    scores = []
    for restarts in (1, 2, 4):
        adversarial = PGD(0.1, steps=3, restarts=restarts)(model, x, labels)
        flipped = model(adversarial).argmax(1) != labels
        scores.append(torch.where(flipped, torch.inf, cross_entropy(model, adversarial, labels)))
    for fewer, more in itertools.pairwise(scores):
        assert (more >= fewer - 1e-6).all()
    assert (scores[2] > scores[0]).any()


class Scripted(nn.Module):
    """One row of a table (calls, samples, classes) a call; the slope lets iterates move. The clean inputs are safe."""

    def __init__(self, table, clean):
        super().__init__()
        self.table, self.clean, self.seen = table, clean, []

    def forward(self, x):
        if torch.equal(x, self.clean):
            return x.sum(1, keepdim=True) * 0 + torch.tensor([20.0, 0.0, 0.0])
        logits = self.table[len(self.seen)]
        self.seen.append(x.detach().clone())
        slope = torch.tensor([-1e-3, 1e-3, 0.0])
        return logits + x.sum(1, keepdim=True) * slope


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_worst_iterate_of_each_sample_is_kept(loss):
    safe, close, closest, wrong = [5.0, 0, 0], [2.0, 1, 0], [2.0, 1.9, 1.8], [0.0, 1, -30]
    table = torch.tensor(
        [  # 2 restarts of 2 steps and a final look each; 3 samples
            [safe, safe, close],
            [close, close, safe],
            [safe, wrong, closest],
            [closest, safe, safe],
            [safe, closest, close],
            [safe, closest, safe],
        ]
    )
    x, labels = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    model = Scripted(table, x)
    adversarial = PGD(EPSILON, steps=2, step_size=0.01, restarts=2, loss=loss, early_stop=False)(model, x, labels)
    assert len(model.seen) == 6
    expected = torch.stack([model.seen[3][0], model.seen[2][1], model.seen[2][2]])
    assert torch.equal(adversarial, expected)


def test_a_misclassified_iterate_beats_a_larger_loss():
    wrong, unsure = [0.0, 0.1, -50], [0.1, 0.0, 0.0]  # cross entropies 0.74 and 1.03
    x = torch.full((1, 4), 0.5)
    model = Scripted(torch.tensor([[wrong], [unsure], [unsure]]), x)
    adversarial = PGD(EPSILON, steps=2, step_size=0.01)(model, x, torch.zeros(1, dtype=torch.long))
    assert torch.equal(adversarial, model.seen[0])


@pytest.mark.parametrize("attack", [PGD, EmbeddingPGD])
def test_errors(attack):
    with pytest.raises(AttackError, match="loss must be ce, margin or dlr; received 'l1'"):
        attack(0.1, loss="l1")
    for options in ({"steps": 0}, {"restarts": 0}, {"steps": -1}):
        with pytest.raises(AttackError, match=r"steps and restarts must be ≥ 1; received steps=-?\d+, restarts=\d"):
            attack(0.1, **options)
    for step_size in (0.0, -1.0, float("nan")):
        with pytest.raises(AttackError, match=f"step_size must be > 0; received {step_size}"):
            attack(0.1, step_size=step_size)
