"""FGSM, PGD and PixelModel against closed-form optima of linear models, and what an attack may not touch."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import FGSM, PGD, PixelModel
from hf_condlr.robustness.attacks.losses import losses

EPSILON = 0.1
LONG = 1e6  # a step after which only its direction counts
ATTACKS = {
    "FGSM": FGSM,
    "FGM l2": lambda epsilon, **options: FGSM(epsilon, norm="l2", **options),
    "PGD linf": PGD,
    "PGD l2": lambda epsilon, **options: PGD(epsilon, "l2", **options),
    "PGD linf margin": lambda epsilon, **options: PGD(epsilon, loss="margin", restarts=2, **options),
    "PGD l2 margin": lambda epsilon, **options: PGD(epsilon, "l2", loss="margin", restarts=2, **options),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()


class Linear(nn.Module):
    """Logits W x + b of flattened inputs."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data = weight
        self.linear.bias.data = torch.zeros(len(weight)) if bias is None else bias

    def forward(self, x):
        return self.linear(x.flatten(1))


def linear_problem(label, *, low=0.0, high=1.0, scale=1.0):
    """Two classes, 64 samples of the class `label` that stay in it however far an attack of these tests goes.

    Returns model, inputs (64, 3, 2, 2), labels and d = ∇(z_other − z_label), which is constant and nowhere small.
    """
    generator = torch.Generator().manual_seed(3)
    d = (0.1 + 0.2 * torch.rand(12, generator=generator)) * torch.randn(12, generator=generator).sign()
    inputs = low + (high - low) * torch.rand(64, 3, 2, 2, generator=generator)
    weight, bias = torch.randn(2, 12, generator=generator), torch.zeros(2)
    weight[1 - label] = weight[label] + d
    bias[label] = (inputs.flatten(1) @ d).max() + 0.3 * d.abs().sum() + 0.2
    return Linear(scale * weight, scale * bias), inputs, torch.full((64,), label), d


def margins(model, x, labels):
    """z_other − z_label in float64, for two classes."""
    with torch.no_grad():
        weight, bias = model.linear.weight.double(), model.linear.bias.double()
        logits = x.double().flatten(1) @ weight.mT + bias
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def cross_entropy(model, x, labels):
    with torch.no_grad():
        return F.cross_entropy(model(x).float(), labels, reduction="none")


def best_l2_in_box(d, x, epsilon):  # (size,), (B, size) -> (B,), float64
    """max d·δ over ‖δ‖₂ ≤ ε and 0 ≤ x + δ ≤ 1: δ = clip(d/λ), λ by bisection, since ‖δ‖ falls in λ."""
    d, x = d.double(), x.double()
    least, most = torch.full((len(x), 1), 1e-9).double(), torch.full((len(x), 1), 1e9).double()
    for _ in range(200):
        middle = (least * most).sqrt()
        outside = torch.maximum(torch.minimum(d / middle, 1 - x), -x).norm(dim=1, keepdim=True) > epsilon
        least, most = torch.where(outside, middle, least), torch.where(outside, most, middle)
    return torch.maximum(torch.minimum(d / most, 1 - x), -x) @ d


def perturbation(adversarial, inputs, norm):
    delta = (adversarial.double() - inputs.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


# ---------------------------------------------------------------------------------- optima of linear models


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.0), (-0.25, 1.0)])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
def test_linf_attacks_reach_the_optimum_of_a_linear_model(label, bounds, epsilon):
    model, x, labels, d = linear_problem(label)
    optimum = (x + epsilon * d.sign().reshape(x.shape[1:])).clamp(*bounds)
    assert (margins(model, optimum, labels) < -0.1).all()
    for attack in (
        FGSM(epsilon, bounds=bounds),
        PGD(epsilon, bounds=bounds),
        PGD(epsilon, steps=3, restarts=2, bounds=bounds),
        PGD(epsilon, loss="margin", bounds=bounds),
        PGD(epsilon, steps=1, step_size=10.0, bounds=bounds),
    ):
        adversarial = attack(model, x, labels)
        assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
        torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-6)  # measured: 0
        assert adversarial.min() >= bounds[0] and adversarial.max() <= bounds[1]


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


@pytest.mark.parametrize("gap", [1.0, 17.0, 40.0, 80.0])
def test_the_gradient_of_a_confident_models_cross_entropy_has_all_its_parts(gap):
    """In float32 softmax(z)_y − 1 is 0 beyond a gap of 17; only the parts of the other classes would be left."""
    logits = torch.tensor([[gap, 0.0, -0.5]], requires_grad=True)
    labels = torch.zeros(1, dtype=torch.long)
    value = losses(logits, labels, "ce")
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    exact = logits.detach().double().requires_grad_(True)
    others = (exact[:, 1:] - exact[:, :1]).exp().sum()
    expected = torch.log1p(others)
    (reference,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(value.double()[0], expected, rtol=1e-5, atol=1e-7)


class Valley(nn.Module):
    """Wrong at the middle, right a little further out: a random start would mend the error."""

    def forward(self, x):
        return torch.stack([(x - 0.5).abs().sum(1) - 1e-3, 0 * x.sum(1)], 1)


def test_an_attack_never_mends_an_error():
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


def test_integer_pixels_and_empty_batches_are_refused():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(AttackError, match=r"inputs must be floating point; received torch\.uint8"):
        PGD(0.1)(Valley(), torch.zeros(2, 2, dtype=torch.uint8), labels)
    with pytest.raises(AttackError, match="inputs must hold at least one sample"):
        PGD(0.1)(Valley(), torch.zeros(0, 2), labels[:0])


# ------------------------------------------------------------------------------------ ball, bounds, random starts


@pytest.fixture(scope="module")
def trained():
    """A small trained MLP on a ball against its outside: model, inputs (200, 6), labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(600, 6)
        labels = ((x - 0.5).square().sum(1) > 0.5).long()
        model = nn.Sequential(
            nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert (model(x).argmax(1) == labels).float().mean() > 0.95
    return model, x[:200], labels[:200]


@each_attack
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 1.5)])
def test_results_lie_in_the_ball_and_the_bounds(trained, attack, bounds):
    model, x, labels = trained
    norm = getattr(attack(1), "norm", "linf")
    for epsilon in (1e-3, 0.05, 0.5, 10.0):
        adversarial = attack(epsilon, bounds=bounds)(model, x, labels)
        assert adversarial.isfinite().all()
        assert (perturbation(adversarial, x, norm) <= epsilon * (1 + 1e-6) + 2e-7).all()
        assert adversarial.min() >= bounds[0] and adversarial.max() <= bounds[1]


@each_attack
def test_no_radius_no_change(trained, attack):
    model, x, labels = trained
    edges = torch.cat([x, torch.zeros(1, 6), torch.ones(1, 6), torch.full((1, 6), 1e-30)])
    with_edges = torch.cat([labels, torch.zeros(3, dtype=torch.long)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = edges.to(dtype)
        adversarial = attack(0.0)(model, inputs, with_edges)
        assert adversarial.dtype == torch.float32 and torch.equal(adversarial, inputs.float())


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
        assert (model(attack(2.0, steps=40)(model, x, labels)).argmax(1) == labels).float().mean() < 0.02


class Flat(nn.Module):
    """Logits that do not depend on the inputs; the gradient is zero, not missing."""

    def forward(self, x):
        return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], 1)


def test_random_starts_are_uniform_in_the_ball():
    """Where all gradients vanish, the result is the random start."""
    x, labels = torch.full((4000, 2, 3), 0.5), torch.zeros(4000, dtype=torch.long)
    start = PGD(EPSILON)(Flat(), x, labels)
    delta = ((start - x) / EPSILON).flatten()
    assert delta.abs().max() <= 1 + 1e-5
    counts = torch.histc(delta, bins=10, min=-1, max=1) / len(delta)
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.01)
    start = PGD(EPSILON, "l2")(Flat(), x, labels)
    delta = ((start - x) / EPSILON).flatten(1)
    assert delta.norm(dim=1).max() <= 1 + 1e-5
    counts = torch.histc(delta.norm(dim=1) ** 6, bins=10, min=0, max=1) / len(
        delta
    )  # radius⁶ is uniform in 6 dimensions
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.03)
    assert delta.mean(0).abs().max() < 0.05
    assert torch.equal(FGSM(EPSILON)(Flat(), x, labels), x)


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


# ------------------------------------------------------------------------------------------- strength


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


# ------------------------------------------------------------------------------------- what stays as it was


@each_attack
def test_attacks_are_deterministic_and_leave_the_global_random_states(trained, attack):
    model, x, labels = trained
    before = random_states()
    first = attack(EPSILON)(model, x, labels)
    assert random_states() == before
    torch.rand(7)
    assert torch.equal(attack(EPSILON)(model, x, labels), first)
    if "FGSM" not in repr(attack(1)):
        assert not torch.equal(attack(EPSILON, seed=1)(model, x, labels), first)


class Watched(nn.Module):
    """Everything an attack might disturb: dropout, batch norm, a frozen parameter, a submodule in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.calls, self.fails_at = 0, None
        self.frozen.requires_grad_(False)
        self.train()
        self.frozen.eval()
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, x):
        self.calls += 1
        assert not any(module.training for module in self.modules())
        assert torch.is_grad_enabled() or not x.requires_grad
        assert not torch.is_autocast_enabled("cpu")
        if self.calls == self.fails_at:
            raise RuntimeError("the model broke")
        return self.head(self.frozen(self.body(x)))

    def state(self):
        return (
            {name: module.training for name, module in self.named_modules()},
            {name: parameter.requires_grad for name, parameter in self.named_parameters()},
            {name: None if p.grad is None else p.grad.tolist() for name, p in self.named_parameters()},
            {name: value.tolist() for name, value in self.state_dict().items()},
        )


@each_attack
def test_the_model_and_the_inputs_are_left_as_they_were(attack):
    model, x, labels = Watched(), torch.rand(5, 6), torch.tensor([0, 1, 0, 1, 1])
    before, inputs = model.state(), x.clone()
    adversarial = attack(EPSILON)(model, x, labels)
    assert model.calls >= 1 and model.state() == before
    assert torch.equal(x, inputs) and not x.requires_grad and x.grad is None
    assert not adversarial.requires_grad
    with torch.no_grad():  # as evaluation loops do
        assert torch.equal(attack(EPSILON)(model, x, labels), adversarial)
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float32 in the attack path
        assert torch.equal(attack(EPSILON)(model, x, labels), adversarial)
        assert torch.is_autocast_enabled("cpu")
    assert model.state() == before


@each_attack
def test_a_graph_behind_the_inputs_does_not_reach_the_result(trained, attack):
    model, x, labels = trained
    inputs = x.clone().requires_grad_(True)
    adversarial = attack(EPSILON)(model, inputs, labels)
    assert not adversarial.requires_grad
    assert inputs.requires_grad and inputs.grad is None
    assert torch.equal(adversarial, attack(EPSILON)(model, x, labels))


@each_attack
def test_the_model_is_left_as_it_was_when_it_raises(attack):
    model, x, labels = Watched(), torch.rand(5, 6), torch.zeros(5, dtype=torch.long)
    before = model.state()
    for model.fails_at in (1,) if "FGSM" in repr(attack(1)) else (1, 2, 11):
        model.calls = 0
        with pytest.raises(RuntimeError, match="the model broke"):
            attack(EPSILON)(model, x, labels)
        assert model.calls == model.fails_at and model.state() == before


# --------------------------------------------------------------------------------------------------- PixelModel


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def test_pixel_model_normalises_each_channel():
    inner = Linear(torch.randn(3, 12), torch.randn(3))
    pixels = torch.rand(4, 3, 2, 2)
    expected = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(PixelModel(inner, MEAN, STD)(pixels), inner(expected))
    torch.testing.assert_close(PixelModel(inner, 0.5, 0.25)(pixels), inner((pixels - 0.5) / 0.25))
    torch.testing.assert_close(PixelModel(inner)(pixels), inner(pixels))
    assert set(PixelModel(inner, MEAN, STD).state_dict()) == {"model.linear.weight", "model.linear.bias"}


@each_attack
def test_pixel_model_measures_the_radius_in_pixels(attack):
    """For FGSM: a pixel step ε sign(g) is the step ε sign(g)/σ of normalised inputs."""
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)) / 8
    inner, labels = Linear(weight, torch.tensor([3.0, 0.0])), torch.zeros(4, dtype=torch.long)
    model = PixelModel(inner, MEAN, STD)
    pixels = 0.3 + 0.4 * torch.rand(4, 3, 2, 2)
    made = attack(EPSILON)
    adversarial = made(model, pixels, labels)
    norm = getattr(made, "norm", "linf")
    size = perturbation(adversarial, pixels, norm)
    torch.testing.assert_close(size, torch.full_like(size, EPSILON), rtol=1e-3, atol=0)
    if norm == "linf":
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
    for make in ATTACKS.values():
        adversarial = make(EPSILON)(model, pixels, labels)
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


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_errors_of_every_attack(attack):
    for epsilon in (-0.1, float("inf"), float("nan")):
        with pytest.raises(AttackError, match=rf"epsilon must be finite and ≥ 0; received {epsilon}"):
            attack(epsilon)
    for bounds in ((1.0, 0.0), (0.5, 0.5), (float("nan"), 1.0)):
        with pytest.raises(AttackError, match=r"bounds must be \(least, largest\); received \("):
            attack(0.1, bounds=bounds)
    model, labels = Linear(torch.randn(2, 3)), torch.zeros(1, dtype=torch.long)
    for inputs in ([-0.5, 0.5, 0.5], [0.5, 0.5, 1.5], [0.5, float("nan"), 0.5]):
        with pytest.raises(AttackError, match=r"inputs must lie within bounds=\(0.0, 1.0\).*PixelModel"):
            attack(0.1)(model, torch.tensor([inputs]), labels)


def test_errors_of_pgd():
    with pytest.raises(AttackError, match="norm must be linf or l2; received 'l1'"):
        PGD(0.1, "l1")
    with pytest.raises(AttackError, match="loss must be ce, margin or dlr; received 'l1'"):
        PGD(0.1, loss="l1")
    for options in ({"steps": 0}, {"restarts": 0}, {"steps": -1}):
        with pytest.raises(AttackError, match=r"steps and restarts must be ≥ 1; received steps=-?\d+, restarts=\d"):
            PGD(0.1, **options)
    for step_size in (0.0, -1.0, float("nan")):
        with pytest.raises(AttackError, match=f"step_size must be > 0; received {step_size}"):
            PGD(0.1, step_size=step_size)
