"""AutoAttack: the package's own result, what it trips over, and its strength beside PGD's."""

import sys

import pytest
import torch
from torch import nn

from hf_condlr.errors import AttackError, MissingExtraError
from hf_condlr.robustness.attacks import PGD, AutoAttack
from tests import classifiers

package = pytest.importorskip("pyautoattack.autoattack")


def limited(attack, **limits):
    """Built with these limits, whatever else is asked for."""
    return lambda *args, **options: attack(*args, **options | limits)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """20 steps and 30 queries instead of 100 and 5000: seconds instead of a minute."""
    for name in ("APGDAttack", "APGDAttack_targeted", "FABAttack_PT"):
        monkeypatch.setattr(package, name, limited(getattr(package, name), n_iter=20))
    monkeypatch.setattr(package, "SquareAttack", limited(package.SquareAttack, n_queries=30))


class FirstClasses(nn.Module):
    """The first few classes of a trained model of ten."""

    def __init__(self, count):
        super().__init__()
        self.model, self.count = classifiers.pixel_mlp(), count

    def forward(self, pixels):
        return self.model(pixels)[:, : self.count]


def problem(count=10, n=40):
    """Model, n digits of the first classes, labels."""
    pixels, labels = classifiers.digits()
    chosen = (labels < count).nonzero()[-n:, 0]
    return FirstClasses(count), pixels[chosen], labels[chosen]


def correct(model, pixels, labels):
    model.eval()
    with torch.no_grad():
        return model(pixels).argmax(1) == labels


# ------------------------------------------------------------------------------------------------- its own result


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_standard_version_of_the_package(norm):
    model, pixels, labels = problem(n=30)
    model.eval()
    epsilon = {"linf": 0.08, "l2": 0.5}[norm]
    own = package.AutoAttack(model, eps=epsilon, norm={"linf": "Linf", "l2": "L2"}[norm], seed=3, version="standard")
    own.square.n_queries = 30
    with torch.random.fork_rng(devices=[]):
        expected, _ = own.run_standard_evaluation(pixels, labels, batch_size=30)
    adversarial = AutoAttack(epsilon, norm, seed=3)(model, pixels, labels)
    fooled = ~correct(model, adversarial, labels)
    assert 5 < fooled.sum() < 25
    assert torch.equal(adversarial, expected)
    assert torch.equal(adversarial[~fooled], pixels[~fooled])  # what it did not fool comes back as it was
    one = AutoAttack(epsilon, norm, attacks=("apgd-ce",))
    assert not torch.equal(one.reseeded(1)(model, pixels, labels), one(model, pixels, labels))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_models_of_few_classes(monkeypatch, norm, count):
    run, epsilon = [], {"linf": 0.15, "l2": 0.9}[norm]
    evaluate = package.AutoAttack.run_standard_evaluation

    def watched(self, *args, **options):
        run.append((self.attacks_to_run, self.apgd_targeted.n_target_classes, self.fab.n_target_classes))
        return evaluate(self, *args, **options)

    monkeypatch.setattr(package.AutoAttack, "run_standard_evaluation", watched)
    model, pixels, labels = problem(count, n=30)
    attack = AutoAttack(epsilon, norm)
    adversarial = attack(model, pixels, labels)
    names = ["apgd-ce", "fab", "square"] if count < 4 else ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert run == [(names, min(9, count - 1), min(9, count - 1))]
    strong = PGD(epsilon, norm, steps=40, restarts=3, loss="margin")(model, pixels, labels)
    assert correct(model, adversarial, labels).sum() <= correct(model, strong, labels).sum() < 30
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (attack.distance(model, pixels, adversarial) <= epsilon * (1 + 1e-6) + 2e-7).all()


# ------------------------------------------------------------------------------------------- what it trips over


def test_single_samples_and_errors_of_the_model():
    """None, one or all of a batch misclassified; nothing left after the first attack."""
    model, pixels, labels = problem(n=6)
    assert correct(model, pixels, labels).all()
    wrong = (labels + 1) % 10
    attack = AutoAttack(0.1, attacks=("apgd-ce", "fab-t", "square"))
    assert torch.equal(attack(model, pixels, wrong), pixels)
    assert torch.equal(attack(model, pixels[:1], wrong[:1]), pixels[:1])
    mixed = torch.where(torch.arange(6) < 5, wrong, labels)
    assert torch.equal(attack(model, pixels, mixed)[:5], pixels[:5])
    assert attack(model, pixels[:1], labels[:1]).shape == (1, 1, 8, 8)
    assert not correct(model, AutoAttack(0.9)(model, pixels, labels), labels).any()
    assert torch.equal(AutoAttack(0.0)(model, pixels, labels), pixels)


def test_channels_last_half_precision_and_double_precision():
    images = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model = classifiers.PixelModel(body)
    labels = model(images).argmax(1)
    attack = AutoAttack(0.02, "l2", attacks=("apgd-ce", "fab-t", "square"))
    expected = attack(model, images, labels)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attack(model, last, labels), expected)
    assert attack(model, images.bfloat16(), labels).dtype == torch.float32
    double = images.double() + 1e-9
    adversarial = attack(model, double, labels)
    kept = correct(model, adversarial, labels)
    assert adversarial.dtype == torch.float64 and 0 < kept.sum() < 12
    assert torch.equal(adversarial[kept], double[kept])


def test_gradients_trace_and_logits_are_left_as_they_were():
    """FAB adds to the parameters' gradients, the check for dynamic models ends tracing, Square writes into logits."""
    model, pixels, labels = problem(n=4)
    learning = [True, False, True, True]
    for parameter, learns in zip(model.parameters(), learning, strict=True):
        parameter.requires_grad_(learns)
    next(model.parameters()).grad = torch.ones(64, 64)
    given = []
    model.register_forward_hook(lambda module, inputs, output: given.append((output, output.detach().clone())))
    traced = sys.gettrace()

    def trace(frame, event, argument):
        return None

    sys.settrace(trace)
    try:
        AutoAttack(0.02, attacks=("fab", "fab-t", "square"))(model, pixels, labels)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(traced)
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    grads = [parameter.grad for parameter in model.parameters()]
    assert (grads[0] == 1).all() and grads[1:] == [None] * 3
    assert given and all(torch.equal(now, then) for now, then in given)


class Broken(nn.Module):
    """Right answers, and gradients that are not finite: √ at 0."""

    def __init__(self):
        super().__init__()
        self.model = classifiers.pixel_mlp()

    def forward(self, pixels):
        return self.model(pixels + (0 * pixels).sqrt())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab", "fab-t"])
def test_gradients_that_are_not_finite_are_refused(norm, attack):
    pixels, labels = classifiers.held_out(10)
    with pytest.raises(AttackError, match="the model must have finite gradients; received infinite or NaN"):
        AutoAttack(0.05, norm, attacks=(attack,))(Broken(), pixels, labels)


# ----------------------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.07), ("l2", 0.45)])
def test_autoattack_is_no_weaker_than_pgd_which_comes_close(norm, epsilon):
    """Of 100 digits, measured: 76 and 76 in ℓ∞, 64 and 65 in ℓ2; with all steps and queries the same."""
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out(100)
    automatic = correct(model, AutoAttack(epsilon, norm)(model, pixels, labels), labels).sum().item()
    pgd = PGD(epsilon, norm, steps=40, restarts=5, loss="margin")(model, pixels, labels)
    ours = correct(model, pgd, labels).sum().item()
    assert 30 < automatic < 90
    assert automatic <= ours <= automatic + 2


# ------------------------------------------------------------------------------------------------------- errors


def test_names_and_settings():
    assert (AutoAttack(0.1).name, AutoAttack(0.1).threat) == ("autoattack-linf", "linf")
    assert (AutoAttack(0.1, "l2").name, AutoAttack(0.1, "l2").threat) == ("autoattack-l2", "l2")
    chosen = AutoAttack(0.1, attacks=["apgd-ce", "square"])  # as YAML gives them
    assert chosen.name == "autoattack-linf(apgd-ce, square)" and hash(chosen)


def test_errors_of_parameters():
    with pytest.raises(AttackError, match=r"attacks must be some of .*; received none"):
        AutoAttack(0.1, attacks=())
    with pytest.raises(AttackError, match=r"attacks must be some of apgd-ce, .*; received apgd-ce, pgd"):
        AutoAttack(0.1, attacks=("apgd-ce", "pgd"))


def test_errors_of_inputs_and_models():
    model, pixels, labels = problem(3, n=2)
    with pytest.raises(AttackError, match=r"inputs must be images \(B, C, H, W\); received \(2, 8, 8\)"):
        AutoAttack(0.1)(model, pixels[:, 0], labels)
    for names, least in ((("apgd-ce", "apgd-t"), 4), (("apgd-dlr",), 3)):
        with pytest.raises(AttackError, match=f"{', '.join(names)} must be given at least {least} classes; received 2"):
            AutoAttack(0.1, attacks=names)(FirstClasses(2), pixels, 0 * labels)
    with pytest.raises(AttackError, match="fab, square must be given at least 2 classes; received 1"):
        AutoAttack(0.1)(FirstClasses(1), pixels, 0 * labels)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(32, 5))
    images = torch.rand(4, 1, 4, 8)
    with pytest.raises(AttackError, match="images of at least 5 rows; received 4"):
        AutoAttack(0.1, "l2")(flat, images, flat(images).argmax(1))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model, pixels, labels = problem(n=2)
    with pytest.raises(MissingExtraError, match=r"pyautoattack.*pip install 'hf_condlr\[autoattack\]'"):
        AutoAttack(0.1)(model, pixels, labels)
