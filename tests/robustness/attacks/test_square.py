"""Square: its geometry, its ball, and its strength beside the reference code's and PGD's."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import PGD, Square
from hf_condlr.robustness.attacks.square import bump, pyramid, square
from tests import classifiers

SAMPLES, QUERIES, SEEDS = 400, 200, range(4)


def accuracy(model, pixels, labels):
    with torch.no_grad():
        return 100 * (model(pixels).argmax(1) == labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (2, 5), (3, 5), (4, 8), (5, 9)])
def test_a_pyramid_sums_the_inverse_squares_of_the_paper(height, width):
    expected = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            ring = max(abs(i - height // 2), abs(j - width // 2))
            expected[i, j] = sum(1 / k**2 for k in range(ring + 1, max(height, width) // 2 + 2))
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(pyramid(height, width), expected, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 9])
def test_a_bump_is_of_norm_one_and_has_two_halves(side):
    eta = bump(side)
    assert eta.shape == (side, side) and eta.norm().item() == pytest.approx(1)
    assert (eta[: side // 2] > 0).all() and (eta[side // 2 :] < 0).all()


def test_squares_reach_every_place_of_the_image_alike():
    draws = torch.rand(2, 30_000, generator=torch.Generator().manual_seed(0))
    mask, row, column = square(*draws, 3, 6, 5)
    assert (mask.sum((2, 3)) == 9).all()
    corners = (mask[:, 0].flatten(1).float().argmax(1)).bincount(minlength=30).reshape(6, 5) / 30_000
    expected = torch.zeros(6, 5)
    expected[:4, :3] = 1 / 12
    torch.testing.assert_close(corners, expected, rtol=0, atol=0.01)
    inside = torch.arange(9.0).reshape(3, 3)[row, column][:, None][mask].reshape(-1, 9)
    assert (inside == torch.arange(9.0)).all()


class Watch(nn.Module):
    """Class 0 by far, unless told otherwise, and what it was asked."""

    def __init__(self, margin=lambda query, x: torch.ones(len(x))):
        super().__init__()
        self.margin, self.asked = margin, []

    def forward(self, x):
        margin = self.margin(len(self.asked), x)
        self.asked.append(x.clone())
        return torch.stack([margin, 0 * margin], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 6, 9), (1, 3, 4), (2, 2, 2)])
def test_proposals_lie_on_the_border_of_the_ball(norm, shape):
    """Far from the bounds: nothing is cut off, and what an erased square had goes into the new one."""
    inputs, model, epsilon = torch.full((6, *shape), 0.5), Watch(), 0.2
    Square(epsilon, norm, queries=60)(model, inputs, torch.zeros(6, dtype=torch.long))
    assert len(model.asked) == 61
    for x in model.asked[1:]:
        delta = (x - inputs).flatten(1)
        size = delta.abs() if norm == "linf" else delta.norm(dim=1)
        torch.testing.assert_close(size, torch.full_like(size, epsilon), rtol=0, atol=1e-6)


def test_the_start_is_stripes_and_each_proposal_one_square():
    """Sides fall as the paper's schedule says: p = 0.8 is halved after 10, 50, 200, ... of 10,000 queries."""
    inputs = torch.full((4, 3, 16, 16), 0.5)
    accepted = Watch(lambda query, x: torch.full((len(x),), 10.0 - query / 1000))  # each query improves the margin
    Square(0.1, queries=1000)(accepted, inputs, torch.zeros(4, dtype=torch.long))
    assert (accepted.asked[1] == accepted.asked[1][:, :, :1]).all()
    largest = 0
    for query, (before, after) in enumerate(zip(accepted.asked[1:], accepted.asked[2:], strict=False), start=1):
        p = 0.8 / 2 ** sum(10 * query > limit for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = max(round(math.sqrt(p * 16 * 16)), 1)
        changed = (after - before).abs().amax(1) > 1e-6  # (B, H, W)
        for image in changed[changed.flatten(1).any(1)]:
            rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
            assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
            largest = max(largest, len(rows)) if query > 800 else largest
    assert largest == 1


@pytest.mark.parametrize("seed", range(5))
def test_an_l2_proposal_is_that_of_the_paper(seed):
    """For each channel: η·(±1) + δ/‖δ‖ on the new square, at the norm of both squares and a share of what ε leaves."""
    epsilon, query, (channels, height, width) = 0.7, 60, (3, 8, 9)
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(2, channels, height, width, generator=generator) / 40  # of norm 0.37: bounds cut some off
    draws = torch.rand(2, 5 + channels, generator=generator)
    attack = Square(epsilon, "l2", queries=1000)
    found = attack._propose(delta, draws, query)
    side = 3  # p = 0.8/16: √(0.05·72) rounded is 2, but 3 at least
    for sample in range(2):
        draw, expected = draws[sample].double().numpy(), delta[sample].double().numpy().copy()
        (top, other_top), (left, other_left) = (
            [int(draw[k] * (length - side + 1)) for k in places]
            for places, length in (((0, 2), height), ((1, 3), width))
        )
        new, old = (
            np.s_[:, top : top + side, left : left + side],
            np.s_[:, other_top : other_top + side, other_left : other_left + side],
        )
        either = np.zeros_like(expected)
        either[new] = either[old] = 1
        moved = ((either * expected) ** 2).sum((1, 2), keepdims=True)
        spare = (epsilon**2 - (expected**2).sum()) / channels
        eta = bump(side).double().numpy()
        eta = eta if draw[4] < 0.5 else eta.T
        sign = np.where(draw[5:] < 0.5, -1, 1)[:, None, None]
        own = expected[new] / np.sqrt((expected[new] ** 2).sum((1, 2), keepdims=True))
        bumps = eta * sign + own
        bumps *= np.sqrt(spare + moved) / np.sqrt((bumps**2).sum((1, 2), keepdims=True))
        expected[old] = 0
        expected[new] = bumps
        expected *= epsilon / np.linalg.norm(expected)
        np.testing.assert_allclose(found[sample].numpy(), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_only_improvements_are_kept_and_a_success_ends_the_queries_of_a_sample(norm):
    def margin(query, x):
        return {0: torch.ones(3), 3: torch.tensor([0.5, 2.0, -1.0])}.get(query, torch.full((len(x),), 0.9))

    model, inputs = Watch(margin), torch.full((3, 1, 8, 8), 0.5)
    adversarial = Square(0.1, norm, queries=10)(model, inputs, torch.zeros(3, dtype=torch.long))
    assert [len(x) for x in model.asked] == [3] * 4 + [2] * 7
    assert torch.equal(adversarial[0], model.asked[3][0])  # 0.5: the smallest
    assert torch.equal(adversarial[1], model.asked[1][1])  # nothing was better than the start
    assert torch.equal(adversarial[2], model.asked[3][2])  # misclassified


def test_what_is_misclassified_stays_as_it_is():
    pixels, labels = classifiers.held_out(50)
    model = classifiers.pixel_mlp().eval()
    wrong = torch.arange(50) % 2 == 0
    labels = torch.where(wrong, (labels + 1) % 10, labels)
    adversarial = Square(0.1, queries=20)(model, pixels, labels)
    assert torch.equal(adversarial[wrong], pixels[wrong]) and not torch.equal(adversarial, pixels)
    assert torch.equal(Square(0.1, queries=20)(model, pixels[wrong], labels[wrong]), pixels[wrong])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_sample_depends_on_the_success_of_another(norm):
    pixels, labels = classifiers.held_out(60)
    model = classifiers.pixel_mlp().eval()
    adversarial = Square(0.3, norm, queries=30)(model, pixels, labels)
    others = labels.clone()
    others[::2] = (labels[::2] + 1) % 10  # misclassified from the start
    again = Square(0.3, norm, queries=30)(model, pixels, others)
    torch.testing.assert_close(again[1::2], adversarial[1::2])


# ----------------------------------------------------------------------------------------------------- strength


@functools.cache
def found(norm, epsilon):
    """Accuracy in % under Square over four seeds, and under PGD."""
    pixels, labels = (values[:SAMPLES] for values in classifiers.digits())
    model = classifiers.pixel_mlp().eval()
    ours = [Square(epsilon, norm, queries=QUERIES, seed=seed)(model, pixels, labels) for seed in SEEDS]
    pgd = PGD(epsilon, norm, steps=20, restarts=2, loss="margin")(model, pixels, labels)
    return np.mean([accuracy(model, x, labels) for x in ours]), accuracy(model, pgd, labels)


cases = pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.12), ("l2", 0.9)])


@cases
def test_square_is_as_strong_as_the_reference_code(norm, epsilon):
    """With equal queries, and once the reference may place squares in the last row and column; without, it is weaker.

    Measured (ours, reference, unchanged reference): ℓ∞ 58.2, 57.7, 62.9; ℓ2 36.4, 36.3, 47.1. Single seeds of the
    reference scatter by 3 in ℓ∞, since all samples share its squares; ours by 1.
    """
    reference = pytest.importorskip("pyautoattack.square").SquareAttack

    class EveryPlace(reference):
        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, shape)

    pixels, labels = (values[:SAMPLES] for values in classifiers.digits())
    model = classifiers.pixel_mlp().eval()
    theirs = {}
    for attack in (EveryPlace, reference):
        runs = [
            attack(model, norm={"linf": "Linf", "l2": "L2"}[norm], n_queries=QUERIES - 1, eps=epsilon, seed=seed)
            for seed in SEEDS
        ]
        theirs[attack] = np.mean([accuracy(model, run.perturb(pixels, labels), labels) for run in runs])
    ours, _ = found(norm, epsilon)
    assert 5 < ours < 90
    assert abs(ours - theirs[EveryPlace]) < 3
    assert ours < theirs[reference] + 1


@cases
def test_square_does_not_beat_pgd_where_no_gradient_is_masked(norm, epsilon):
    ours, pgd = found(norm, epsilon)
    assert ours >= pgd - 0.2


def test_square_sees_through_a_masked_gradient():
    """Rounded pixels have a zero gradient: PGD only tries its random start."""

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = classifiers.pixel_mlp()

        def forward(self, x):
            return self.model((x * 31).round() / 31 + 0 * x)

    pixels, labels = (values[:200] for values in classifiers.digits())
    model = Rounded().eval()
    pgd = accuracy(model, PGD(0.15, steps=20)(model, pixels, labels), labels)
    square = accuracy(model, Square(0.15, queries=QUERIES)(model, pixels, labels), labels)
    assert square < pgd - 20  # measured: PGD 100, Square 32


def test_more_queries_only_help():
    pixels, labels = classifiers.held_out(100)
    model = classifiers.pixel_mlp().eval()
    found = [accuracy(model, Square(0.15, queries=n)(model, pixels, labels), labels) for n in (1, 30, 300)]
    assert found[0] > found[1] + 5 and found[1] > found[2] + 5  # measured: 93, 82, 37


def test_errors():
    with pytest.raises(AttackError, match="queries must be ≥ 1; received 0"):
        Square(0.1, queries=0)
    for p_init in (0.0, 1.5):
        with pytest.raises(AttackError, match=rf"p_init must be a share in \(0, 1\]; received {p_init}"):
            Square(0.1, p_init=p_init)
    with pytest.raises(AttackError, match=r"inputs must be images \(B, C, H, W\); received \(2, 6\)"):
        Square(0.1)(nn.Linear(6, 2), torch.rand(2, 6), torch.zeros(2, dtype=torch.long))
