"""FGSM and PGD against closed-form optima of linear models, and their strength on a trained one."""

import pytest
import torch

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import FGSM, PGD
from tests.robustness.attacks.problems import (
    EPSILON,
    LONG,
    Linear,
    cross_entropy,
    linear_problem,
    margins,
    perturbation,
)

ATTACKS = {
    "FGSM": FGSM,
    "FGM l2": lambda epsilon, **options: FGSM(epsilon, norm="l2", **options),
    "PGD linf": PGD,
    "PGD l2": lambda epsilon, **options: PGD(epsilon, "l2", **options),
    "PGD linf margin": lambda epsilon, **options: PGD(epsilon, loss="margin", restarts=2, **options),
    "PGD l2 margin": lambda epsilon, **options: PGD(epsilon, "l2", loss="margin", restarts=2, **options),
}


each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def best_l2_in_box(d, x, epsilon):  # (size,), (B, size) -> (B,), float64
    """max d·δ over ‖δ‖₂ ≤ ε and 0 ≤ x + δ ≤ 1: δ = clip(d/λ), λ by bisection, since ‖δ‖ falls in λ."""
    d, x = d.double(), x.double()
    least, most = torch.full((len(x), 1), 1e-9).double(), torch.full((len(x), 1), 1e9).double()
    for _ in range(200):
        middle = (least * most).sqrt()
        outside = torch.maximum(torch.minimum(d / middle, 1 - x), -x).norm(dim=1, keepdim=True) > epsilon
        least, most = torch.where(outside, middle, least), torch.where(outside, most, middle)
    return torch.maximum(torch.minimum(d / most, 1 - x), -x) @ d


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
def test_linf_attacks_reach_the_optimum_of_a_linear_model(label, epsilon):
    model, x, labels, d = linear_problem(label)
    optimum = (x + epsilon * d.sign().reshape(x.shape[1:])).clamp(0, 1)
    assert (margins(model, optimum, labels) < -0.1).all()
    for attack in (
        FGSM(epsilon),
        PGD(epsilon),
        PGD(epsilon, steps=3, restarts=2),
        PGD(epsilon, loss="margin"),
        PGD(epsilon, steps=1, step_size=10.0),
    ):
        adversarial = attack(model, x, labels)
        assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
        torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-6)  # measured: 0
        assert adversarial.min() >= 0 and adversarial.max() <= 1


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_l2_pgd_reaches_the_optimum_of_a_linear_model(label, loss):
    """With a long step; steps of 2.5 ε/steps do not turn every random start all the way."""
    model, x, labels, d = linear_problem(label, low=0.4, high=0.6)
    epsilon = 0.3
    optimum = x + epsilon * (d / d.norm()).reshape(x.shape[1:])
    assert optimum.min() > 0 and optimum.max() < 1 and (margins(model, optimum, labels) < -0.1).all()
    adversarial = PGD(epsilon, "l2", step_size=LONG, loss=loss)(model, x, labels)
    torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-6)  # measured: 3e-7
    best = margins(model, optimum, labels) - margins(model, x, labels)
    for steps in (10, 40):
        adversarial = PGD(epsilon, "l2", steps=steps, loss=loss)(model, x, labels)
        gain = margins(model, adversarial, labels) - margins(model, x, labels)
        assert (gain >= 0.94 * best).all()  # measured: 0.959, with a mean of 0.98
        assert (perturbation(adversarial, x, "l2") <= epsilon + 1e-6).all()


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_l2_pgd_is_near_the_optimum_where_bounds_cut_the_ball(loss):
    """Ball, then bounds: not the projection on what they share, so that up to α of the radius stays unused."""
    model, x, labels, d = linear_problem(0)
    epsilon = 0.5
    assert (x.flatten(1) + epsilon * d / d.norm() > 1).any()
    best = best_l2_in_box(d, x.flatten(1), epsilon)
    adversarial = PGD(epsilon, "l2", steps=100, step_size=epsilon / 20, loss=loss)(model, x, labels)
    gain = margins(model, adversarial, labels) - margins(model, x, labels)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (gain <= best + 1e-5).all()
    assert (gain >= 0.98 * best).all()  # measured: 0.9936


def test_margin_of_several_classes_takes_the_nearest_other_class():
    """Class 2 is the runner-up everywhere in the ball; the CE gradient also listens to class 1, the margin does not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 12, generator=generator) / 4
    model = Linear(weight, torch.tensor([8.0, -1.0, 3.0]))
    x, labels = torch.rand(32, 3, 2, 2, generator=generator), torch.zeros(32, dtype=torch.long)
    step = EPSILON * (weight[2] - weight[0]).sign().reshape(3, 2, 2)
    optimum = (x + step).clamp(0, 1)
    assert (model(optimum).argmax(1) == 0).all()
    torch.testing.assert_close(PGD(EPSILON, loss="margin")(model, x, labels), optimum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_margin_is_not_masked_by_large_logits(norm):
    model, x, labels, d = linear_problem(0, scale=300.0, low=0.4, high=0.6)
    direction = d.sign() if norm == "linf" else d / d.norm()
    attack = PGD(EPSILON, norm, step_size=LONG, loss="margin")
    optimum = x + EPSILON * direction.reshape(x.shape[1:])
    torch.testing.assert_close(attack(model, x, labels), optimum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 60.0])
def test_small_gradients_give_full_steps(norm, gap):
    """A confident model's CE is 0 in float32, its gradient as small as exp(−gap); it still points the way."""
    d = torch.linspace(-1, 1, 8)
    model = Linear(torch.stack([-d, d]) / 2, torch.tensor([gap, 0.0]))
    x, labels = torch.full((4, 8), 0.5), torch.zeros(4, dtype=torch.long)
    optimum = x + EPSILON * (d.sign() if norm == "linf" else d / d.norm())
    adversarial = PGD(EPSILON, norm, step_size=LONG)(model, x, labels)
    torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-6)


def test_integer_pixels_and_empty_batches_are_refused():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(AttackError, match=r"inputs must be floating point; received torch\.uint8"):
        PGD(0.1)(Linear(torch.eye(2)), torch.zeros(2, 2, dtype=torch.uint8), labels)
    with pytest.raises(AttackError, match="inputs must hold at least one sample"):
        PGD(0.1)(Linear(torch.eye(2)), torch.zeros(0, 2), labels[:0])


@each_attack
def test_a_huge_radius_leaves_nothing_and_accuracy_falls_with_the_radius(trained, attack):
    model, x, labels = trained
    accuracy = []
    for epsilon in (0.0, 0.02, 0.1, 0.3):
        logits = model(attack(epsilon)(model, x, labels))
        accuracy.append((logits.argmax(1) == labels).float().mean().item())
    assert accuracy[0] == (model(x).argmax(1) == labels).float().mean().item()
    assert sorted(accuracy, reverse=True) == accuracy and accuracy[1] < accuracy[0] - 0.02
    if "FGSM" not in repr(attack(1)):
        assert (model(attack(1.0, steps=40)(model, x, labels)).argmax(1) == labels).float().mean() < 0.02


@pytest.mark.parametrize("epsilon", [0.03, 0.1, 0.2])
def test_pgd_is_no_weaker_than_fgsm(trained, epsilon):
    model, x, labels = trained
    fast = FGSM(epsilon)(model, x, labels)
    kept_by_fast = model(fast).argmax(1) == labels
    for loss in ("ce", "margin"):
        slow = PGD(epsilon, steps=20, restarts=3, loss=loss)(model, x, labels)
        kept = model(slow).argmax(1) == labels
        assert kept.sum() <= kept_by_fast.sum()
        assert not (kept & ~kept_by_fast).any()
        gain = (cross_entropy(model, slow, labels) - cross_entropy(model, fast, labels))[kept]
        assert len(gain) == 0 or gain.mean() > 0


@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_errors_of_every_attack(attack):
    with pytest.raises(AttackError, match="norm must be linf or l2; received 'l1'"):
        attack(0.1, norm="l1")
    model, labels = Linear(torch.randn(2, 3)), torch.zeros(1, dtype=torch.long)
    for inputs in ([-0.5, 0.5, 0.5], [0.5, 0.5, 1.5], [0.5, float("nan"), 0.5]):
        with pytest.raises(AttackError, match=r"inputs must be pixels of \[0, 1\].*PixelModel"):
            attack(0.1)(model, torch.tensor([inputs]), labels)
