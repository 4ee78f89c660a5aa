"""FGM, PGD and the search on embeddings: closed-form optima, their ball, their strength, and what stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import EmbeddingFGM, EmbeddingPGD, EmbeddingSearch, TextModel
from tests.robustness.attacks.problems import random_states
from tests.text_models import classifier, reviews, token_batch, trained_reviewer

LONG = 1e6  # a step after which only its direction counts
ATTACKS = {
    "FGM": EmbeddingFGM,
    "PGD": EmbeddingPGD,
    "PGD margin": lambda epsilon: EmbeddingPGD(epsilon, loss="margin", restarts=2),
    "search": lambda epsilon: EmbeddingSearch(epsilon, queries=30),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


class Bag(nn.Module):
    """Logits Σ_i W E_i + b over the tokens that are no padding; id 0 pads, and its embedding is 0."""

    def __init__(self, weight, bias, vocabulary=20):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = torch.linspace(0.5, 4, vocabulary)[:, None]  # tokens of different norms
        table = size * torch.randn(vocabulary, weight.shape[1], generator=generator)
        self.table = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
        self.table.weight.data[0] = 0
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.config = type("Config", (), {"pad_token_id": 0, "eos_token_id": 1})()
        self.seen = []

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask):
        self.seen.append((len(input_ids), torch.is_grad_enabled()))
        return (self.table(input_ids) * attention_mask[..., None]).sum(1) @ self.weight.mT + self.bias


def linear_problem(label=0, classes=2, gap=20.0):
    """Three samples, the nearest with a margin of −gap to the class 1 − label; other classes are further.

    d is the difference of the weights that an attack should follow. Two classes have the weights ±d/2: where the gap
    is above 16, p_y − 1 is 0 in float32, and cross entropy follows the other class's weights alone.
    """
    weight = torch.randn(classes, 6, generator=torch.Generator().manual_seed(1)) / 10
    if classes == 2:
        weight[1] = -weight[0]
    bag = Bag(weight, torch.full((classes,), -1000.0))
    tokens = token_batch(vocabulary=20)
    tokens["input_ids"] = torch.where(tokens["input_ids"] == 2, 1, tokens["input_ids"])
    with torch.no_grad():
        logits = bag(**tokens)
        bag.bias[label], bag.bias[1 - label] = 0.0, -(logits[:, 1 - label] - logits[:, label]).max() - gap
    bag.seen.clear()
    return TextModel(bag), tokens, torch.full((3,), label), weight[1 - label] - weight[label]


def margins(model, tokens, labels):
    with torch.no_grad():
        logits = model(tokens)
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def sizes(model, tokens, perturbation):
    """‖δ_i‖/‖E_i‖ in float64, 0 where both are."""
    norms = model.embed(tokens).double().norm(dim=-1)
    return perturbation.double().norm(dim=-1) / norms.clamp_min(1e-30)


# ------------------------------------------------------------------------------------ optima of a linear model


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
@pytest.mark.parametrize("classes", [2, 4])
def test_attacks_reach_the_optimum_of_a_bag_of_embeddings(label, epsilon, classes):
    """Every token goes ε‖E_i‖ along d, however long the others are; CE listens to one rival only with two classes."""
    model, tokens, labels, d = linear_problem(label, classes)
    norms = model.embed(tokens).double().norm(dim=-1, keepdim=True)
    editable = (tokens["input_ids"] > 1)[..., None]
    optimum = torch.where(editable, epsilon * norms * (d / d.norm()).double(), 0.0).float()
    attacks = [EmbeddingPGD(epsilon, step_size=LONG, loss="margin"), EmbeddingPGD(epsilon, steps=1, loss="margin")]
    if classes == 2:
        attacks += [EmbeddingFGM(epsilon), EmbeddingPGD(epsilon, step_size=LONG, restarts=2)]
    for attack in attacks:
        adversarial = attack(model, tokens, labels)
        if getattr(attack, "step_size", None) is not None or isinstance(attack, EmbeddingFGM):
            torch.testing.assert_close(adversarial["perturbation"], optimum, rtol=0, atol=1e-6)  # measured: 5e-7
        best = margins(model, {**tokens, "perturbation": optimum}, labels) - margins(model, tokens, labels)
        gain = margins(model, adversarial, labels) - margins(model, tokens, labels)
        assert (gain <= best + 1e-3).all() and (gain >= 0.8 * best).all()


@pytest.mark.parametrize("attack", [EmbeddingFGM(0.1), EmbeddingPGD(0.1, step_size=LONG)])
def test_small_gradients_give_full_steps(attack):
    """Cross entropy with a gap of 45 and more: its gradient is below 1e-19, its square 0 in float32."""
    model, tokens, labels, d = linear_problem(gap=45.0)
    adversarial = attack(model, tokens, labels)
    direction = F.normalize(adversarial["perturbation"][tokens["input_ids"] > 1], dim=1)
    torch.testing.assert_close(direction, (d / d.norm()).expand_as(direction), rtol=0, atol=1e-5)
    assert torch.allclose(attack.distance(model, tokens, adversarial), torch.tensor(0.1))


def test_the_search_climbs_without_gradients_query_by_query():
    model, tokens, labels, _ = linear_problem()
    gains = []
    for queries in (1, 10, 100):
        model.model.seen.clear()
        adversarial = EmbeddingSearch(0.3, queries=queries)(model, tokens, labels)
        assert model.model.seen == [(3, False)] * (queries + 1)
        gains.append(margins(model, adversarial, labels) - margins(model, tokens, labels))
    assert (gains[0] >= 0).all() and (gains[1] > gains[0]).any() and (gains[2] > gains[1]).all()


def test_steps_cost_a_pass_each_and_stop_where_a_sample_is_misclassified():
    model, tokens, labels, d = linear_problem()
    EmbeddingPGD(0.1, steps=7)(model, tokens, labels)
    assert model.model.seen == [(3, False)] + [(3, True)] * 7 + [(3, False)]
    gap = -margins(model, tokens, labels)
    reach = (model.embed(tokens).norm(dim=-1) * model.editable(tokens)).sum(1) * d.norm()
    epsilon = float((gap / reach).sort().values[:2].mean())  # the first falls, the others do not
    model.model.seen.clear()
    adversarial = EmbeddingPGD(epsilon, steps=7, step_size=LONG)(model, tokens, labels)
    assert model.model.seen == [(3, False), (3, True), (3, True)] + [(2, True)] * 5 + [(2, False)]
    assert (margins(model, adversarial, labels) > 0).sum() == 1


def test_random_starts_are_uniform_in_each_tokens_ball():
    """Where all gradients vanish, the result is the start."""
    model = TextModel(Bag(torch.zeros(2, 3), torch.tensor([1.0, 0.0])))
    tokens = {"input_ids": torch.full((500, 8), 7), "attention_mask": torch.ones(500, 8)}
    start = EmbeddingPGD(0.1)(model, tokens, torch.zeros(500, dtype=torch.long))["perturbation"]
    share = (sizes(model, tokens, start) / 0.1).flatten() ** 3  # radius³ is uniform in 3 dimensions
    assert share.max() <= 1 + 1e-5
    counts = torch.histc(share.float(), bins=10, min=0, max=1) / share.numel()
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.03)
    other = EmbeddingPGD(0.1, seed=1)(model, tokens, torch.zeros(500, dtype=torch.long))["perturbation"]
    assert not torch.equal(start, other)


# ----------------------------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def trained():
    """A `TextModel`, 48 reviews and their labels."""
    texts, labels = reviews(48, seed=2)
    return TextModel(*trained_reviewer()), texts, labels


@torch.no_grad()
def kept(model, inputs, labels):
    return model(inputs).argmax(1) == labels


@each_attack
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 3.0])
def test_results_lie_in_the_ball_and_special_tokens_stay(trained, attack, epsilon):
    model, texts, labels = trained
    mixed = [text[: 9 + 3 * i] for i, text in enumerate(texts[:16])]
    attack = attack(epsilon)
    adversarial = attack(model, mixed, labels[:16])
    tokens, delta = dict(model.encode(mixed)), adversarial["perturbation"]
    assert set(adversarial) == {*tokens, "perturbation"}
    assert all(torch.equal(adversarial[name], value) for name, value in tokens.items())
    assert delta.dtype == torch.float32 and not delta.requires_grad and delta.isfinite().all()
    size = sizes(model, tokens, delta)
    assert (size <= epsilon * (1 + 1e-6)).all() and (size[~model.editable(tokens)] == 0).all()
    distance = attack.distance(model, mixed, adversarial)
    torch.testing.assert_close(distance.double(), size.amax(1), rtol=1e-5, atol=0)
    assert distance.max() > 0.5 * epsilon or "search" in attack.name


@each_attack
def test_no_radius_no_change(trained, attack):
    model, texts, labels = trained
    adversarial = attack(0.0)(model, texts, labels)
    assert (adversarial["perturbation"] == 0).all()
    assert (attack(0.0).distance(model, texts, adversarial) == 0).all()
    assert torch.equal(kept(model, adversarial, labels), kept(model, texts, labels))


@each_attack
def test_accuracy_falls_with_the_radius(trained, attack):
    model, texts, labels = trained
    accuracy = [kept(model, attack(e)(model, texts, labels), labels).float().mean().item() for e in (0, 0.2, 0.6)]
    assert sorted(accuracy, reverse=True) == accuracy and accuracy[2] < accuracy[0] - 0.1
    if "pgd" in attack(1).name:
        adversarial = EmbeddingPGD(10.0, steps=40, restarts=2, loss="margin")(model, texts, labels)
        assert not kept(model, adversarial, labels).any()


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.4])
def test_pgd_is_no_weaker_than_one_step_or_the_search(trained, epsilon):
    model, texts, labels = trained
    strong = [EmbeddingPGD(epsilon, steps=30, restarts=3, loss=loss)(model, texts, labels) for loss in ("ce", "margin")]
    for weak in (EmbeddingFGM(epsilon), EmbeddingSearch(epsilon, queries=100)):
        kept_by_weak = kept(model, weak(model, texts, labels), labels)
        for adversarial in strong:
            assert kept(model, adversarial, labels).sum() <= kept_by_weak.sum()


@each_attack
def test_texts_and_their_tokens_are_attacked_alike(trained, attack):
    model, texts, labels = trained
    tokens = dict(model.encode(texts))
    given = {**tokens, "perturbation": torch.ones_like(model.embed(tokens))}
    first = attack(0.1)(model, texts, labels)["perturbation"]
    assert torch.equal(attack(0.1)(model, tokens, labels)["perturbation"], first)
    assert torch.equal(attack(0.1)(model, given, labels)["perturbation"], first)  # what was there is replaced
    assert (given["perturbation"] == 1).all() and "perturbation" not in tokens


def test_an_attack_never_corrects_an_error(trained):
    model, texts, labels = trained
    wrong = 1 - labels
    lost = ~kept(model, texts, wrong)
    assert lost.sum() > 40
    for attack in (EmbeddingPGD(3.0), EmbeddingSearch(3.0)):
        adversarial = attack(model, texts, wrong)
        assert (adversarial["perturbation"][lost] == 0).all() and not kept(model, adversarial, wrong)[lost].any()


def test_probabilities_are_labels_of_the_gradient_attacks(trained):
    model, texts, labels = trained
    for attack in (EmbeddingFGM(0.1), EmbeddingPGD(0.1)):
        soft = attack(model, texts, F.one_hot(labels, 2).float())["perturbation"]
        torch.testing.assert_close(soft, attack(model, texts, labels)["perturbation"], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ what stays as it was


@each_attack
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Bart"])
def test_the_model_is_left_as_it_was(attack, name):
    inner, tokens = classifier(name).train(), token_batch()
    inner.get_input_embeddings().weight.requires_grad_(False)
    last = list(inner.parameters())[-1]
    last.grad = torch.ones_like(last)
    model = TextModel(inner)
    labels = model.eval()(tokens).argmax(1)
    inner.train()
    state = {key: value.clone() for key, value in inner.state_dict().items()}
    flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    before = random_states()
    first = attack(0.1)(model, tokens, labels)["perturbation"]
    assert random_states() == before
    assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in inner.state_dict().items())
    assert [p.grad is None for p in inner.parameters()].count(False) == 1
    torch.rand(7)
    with torch.no_grad():
        assert torch.equal(attack(0.1)(model, tokens, labels)["perturbation"], first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(0.1)(model, tokens, labels)["perturbation"], first)


@each_attack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_attacked_in_float32(attack, dtype):
    model, tokens = TextModel(classifier("Bert", dtype)), token_batch()
    labels = model(tokens).argmax(1)
    adversarial = attack(0.3)(model, tokens, labels)
    assert adversarial["perturbation"].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (attack(0.3).distance(model, tokens, adversarial) <= 0.3 * (1 + 1e-6)).all()
    assert (margins(model, adversarial, labels) > margins(model, tokens, labels)).any()


# --------------------------------------------------------------------------------------------- distance, errors


def test_distance_is_infinite_where_more_was_changed_than_words():
    model, tokens, labels, _ = linear_problem()
    attack = EmbeddingFGM(0.1)
    adversarial = attack(model, tokens, labels)
    moved = {**adversarial, "perturbation": adversarial["perturbation"].clone()}
    moved["perturbation"][1, -1, 0] = 1e-3  # padding
    other = {**adversarial, "input_ids": tokens["input_ids"].clone()}
    other["input_ids"][2, 0] = 5
    assert attack.distance(model, tokens, moved).isinf().tolist() == [False, True, False]
    assert attack.distance(model, tokens, other).isinf().tolist() == [False, False, True]


def test_errors():
    with pytest.raises(AttackError, match="queries must be ≥ 1; received 0"):
        EmbeddingSearch(0.1, queries=0)
    with pytest.raises(AttackError, match=r"attacks on texts need a TextModel; received Bert.*TextModel\(model"):
        EmbeddingPGD(0.1)(classifier("Bert"), token_batch(), torch.zeros(3, dtype=torch.long))
