"""`evaluate_robustness`: the numbers, what stays as it was, and what is refused."""

import json
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import evaluate_robustness
from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.attacks import PGD, Corruption
from hf_condlr.robustness.attacks.base import Attack
from tests import classifiers
from tests.robustness.evaluation.evaluation import ATTACKS, evaluate


def test_the_numbers_are_those_of_the_attacks_batch_by_batch():
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    report = evaluate(model)
    assert report.samples == 200 and report.labels == labels.tolist()
    correct = model(pixels).argmax(1) == labels
    assert report.correct == correct.tolist() and 0.9 < report.clean_accuracy < 1
    for attack, result in zip(ATTACKS, report.attacks, strict=True):
        expected = torch.zeros(200, dtype=torch.bool)
        for number, index in enumerate(torch.arange(200).split(48)):
            index = index[correct[index]]
            adversarial = attack.reseeded(number)(model, pixels[index], labels[index])
            expected[index] = model(adversarial).argmax(1) == labels[index]
        assert result.survived == expected.tolist()
        assert result.robust_accuracy == expected.sum().item() / 200
        assert 0.05 < result.robust_accuracy < 0.9
        assert result.largest_distance == pytest.approx(attack.epsilon, rel=0.01)
        assert result.settings["epsilon"] == attack.epsilon and result.settings["attack"] == attack.name
    linf = [a.survived for a in report.attacks[:3]]
    [case, _] = report.worst_cases
    assert case.survived == [all(flags) for flags in zip(*linf, strict=True)]
    assert report.robust_accuracy == np.mean(
        [all(flags) for flags in zip(*(a.survived for a in report.attacks), strict=True)]
    )


def test_a_wrong_sample_counts_as_wrong_under_every_adversary_but_a_corruption_may_correct_it():
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out()

    class Always(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float() + 0 * x.sum()

    report = evaluate(Always(), attacks=[PGD(0.0), Corruption("contrast", 1)])
    assert report.clean_accuracy == report.attacks[0].robust_accuracy == (labels == 3).sum().item() / 200
    corruption = Corruption("gaussian_noise", 5)
    report = evaluate(model, attacks=[corruption], batch_size=200)
    corrupted = corruption.reseeded(0)(model, pixels, labels)
    expected = model.eval()(corrupted).argmax(1) == labels
    assert report.attacks[0].survived == expected.tolist()
    assert report.robust_accuracy <= report.attacks[0].robust_accuracy


def test_the_model_and_the_random_states_are_as_before():
    model = classifiers.mlp()
    model.layers[1].eval()
    model.layers[4].weight.grad = torch.ones(10, 64)
    model.layers[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    report = evaluate_robustness(
        model, classifiers.images(64), ATTACKS, processor=classifiers.processor(), progress=False, check_samples=32
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.layers[4].weight.grad, torch.ones(10, 64)) and model.layers[1].weight.grad is None
    assert not model.layers[4].bias.requires_grad and model.layers[1].weight.requires_grad
    assert report.settings["dtype"] == "float32" and report.settings["mean"] == pytest.approx([classifiers.MEAN])


def test_max_samples_draws_the_same_samples_for_every_model():
    first = evaluate(max_samples=50)
    second = evaluate(classifiers.pixel_mlp(scale=2.0), max_samples=50)
    other = evaluate(max_samples=50, seed=1)
    assert first.samples == second.samples == 50
    assert first.settings["samples_digest"] == second.settings["samples_digest"] != other.settings["samples_digest"]
    labels = classifiers.held_out()[1]
    assert len(set(first.labels)) == 10 and first.labels != labels[:50].tolist()
    assert evaluate(max_samples=10_000).samples == 200


@dataclass(frozen=True)
class Nothing(Attack):
    """Returns the inputs."""

    epsilon: float
    name, threat = "nothing", "none"

    def __call__(self, model, inputs, labels):
        return inputs


def test_an_attack_of_ones_own():
    report = evaluate(attacks=[Nothing(1.0)])
    assert report.attacks[0].survived == report.correct and report.attacks[0].largest_distance is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_of_one_output_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(EvaluationError, match=r"of at least two classes; received .*\(48, 1\)"):
        evaluate(model)
