"""CharacterAttack: budget, greedy choice, ranking, and texts of every kind."""

import random
import re

import pytest
import torch
import transformers
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import CharacterAttack, TextModel
from hf_condlr.robustness.attacks.characters import Draft, margins_of, rank
from hf_condlr.robustness.attacks.words import Words, typos
from tests.robustness.attacks.problems import random_states
from tests.robustness.attacks.test_words import STRANGE, UNICODE
from tests.text_models import FILLER, bert_for, byte_tokenizer, classifier, reviews, trained_reviewer, word_tokenizer


@torch.no_grad()
def kept(model, texts, labels):
    return model(texts).argmax(1) == labels


def changed_words(before, after):
    """How many words differ, told by spaces alone; spaces must not."""
    assert re.findall(r"\s+", before) == re.findall(r"\s+", after)
    return sum(a != b for a, b in zip(before.split(), after.split(), strict=True))


@pytest.fixture(scope="module")
def trained():
    """A `TextModel`, 64 reviews of 12 words and their labels."""
    return TextModel(*trained_reviewer()), *reviews(64, seed=3)


@pytest.fixture
def bytewise():
    """A random `TextModel` that reads bytes: every typo moves its logits."""
    tokenizer = byte_tokenizer()
    return TextModel(bert_for(tokenizer), tokenizer)


def own_labels(model, texts):
    return model(texts).argmax(1)


# -------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.08, 0.17, 0.25, 1.0])
@pytest.mark.parametrize("edits", [1, 3])
def test_no_more_words_than_the_budget_are_changed(trained, bytewise, epsilon, edits):
    attack = CharacterAttack(epsilon, edits=edits, candidates=4)
    budget = {0.0: 0, 1e-6: 1, 0.08: 1, 0.17: 2, 0.25: 3, 1.0: 12}[epsilon]  # of 12 words
    texts = reviews(12, seed=4)[0]
    for model, labels in ((trained[0], reviews(12, seed=4)[1]), (bytewise, own_labels(bytewise, texts))):
        adversarial = attack(model, texts, labels)
        changed = [changed_words(*pair) for pair in zip(texts, adversarial, strict=True)]
        assert max(changed) <= budget and (budget == 0) == (max(changed) == 0)
        share = torch.tensor(changed) / 12
        distance = attack.distance(model, texts, adversarial)
        torch.testing.assert_close(distance, torch.where(share == 1 / 12, share.clamp_max(epsilon), share))
        assert (distance <= epsilon * (1 + 1e-5)).all()
        if model is bytewise and budget <= 3:  # every word helps there: only what is fooled has any left
            left = torch.tensor(changed) < budget
            assert not (left & kept(model, adversarial, labels)).any()


@pytest.mark.parametrize(("epsilon", "words", "budget"), [(0.29, 100, 29), (0.1, 30, 3), (0.3, 10, 3), (0.5, 1, 1)])
def test_the_budget_is_the_floor_of_the_exact_product(epsilon, words, budget):
    assert CharacterAttack(epsilon).budget(words) == budget


def test_more_words_fool_more(trained):
    model, texts, labels = trained
    fooled = [(~kept(model, CharacterAttack(e)(model, texts, labels), labels)).sum().item() for e in (0, 0.1, 0.2, 0.5)]
    assert sorted(fooled) == fooled and fooled[0] < fooled[1] < fooled[2]


def test_a_word_that_no_typo_helps_stays_and_is_not_counted(trained):
    """[UNK] instead of a filler word may help or not; what is changed helped."""
    model, texts, labels = trained
    one, two = CharacterAttack(0.1)(model, texts, labels), CharacterAttack(0.17)(model, texts, labels)
    values = [margins_of(model, labels, {i: [text] for i, text in enumerate(b)}) for b in (texts, one, two)]
    for i in range(64):
        assert values[0][i] <= values[1][i] <= values[2][i]
        assert (texts[i] == one[i]) == (values[0][i] == values[1][i])


# -------------------------------------------------------------------------------------------------- the search


@torch.no_grad()
def test_the_best_typo_of_a_word_is_kept(bytewise):
    texts = ["film", "no !", "7 gripping 8"]
    labels = own_labels(bytewise, texts)
    adversarial = CharacterAttack(0.5, candidates=10_000)(bytewise, texts, labels)
    for text, label, result in zip(texts, labels, adversarial, strict=True):
        word = max(text.split(), key=len)
        options = [text, *(text.replace(word, typo) for typo in typos(word, 10_000, random.Random(0)))]
        logits = torch.cat([bytewise([option]) for option in options])
        own = logits[:, label]
        margins = dict(zip(options, (logits[:, 1 - label] - own).tolist(), strict=True))
        if max(margins.values()) > 0:
            assert margins[result] > 0
        assert margins[result] >= max(margins.values()) - 1e-5


def test_further_edits_build_on_the_first(bytewise):
    texts = ["remarkable"]
    labels = own_labels(bytewise, texts)
    margins = []
    for edits in (1, 2, 4):
        result = CharacterAttack(1.0, edits=edits)(bytewise, texts, labels)
        margins.append(margins_of(bytewise, labels, {0: result})[0][0])
    assert margins[0] <= margins[1] <= margins[2] and margins[0] < margins[2]


def test_texts_do_not_depend_on_their_batch_nor_on_global_randomness(trained):
    model, texts, labels = trained
    attack = CharacterAttack(0.2, candidates=5)
    before = random_states()
    together = attack(model, texts, labels)
    assert random_states() == before
    torch.rand(3)
    random.random()
    assert attack(model, texts, labels) == together
    assert [attack(model, [texts[i]], labels[[i]])[0] for i in range(64)] == together
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = attack(model, [texts[i] for i in order], labels[order])
    assert shuffled == [together[i] for i in order]
    assert attack.reseeded(3) == attack
    assert CharacterAttack(0.2, candidates=5, seed=1)(model, texts, labels) != together


def test_an_attack_never_corrects_an_error(trained):
    model, texts, labels = trained
    wrong = ~kept(model, texts, 1 - labels)
    assert wrong.sum() > 50
    adversarial = CharacterAttack(1.0)(model, texts, 1 - labels)
    assert all(a == b for a, b, w in zip(texts, adversarial, wrong, strict=True) if w)


# ------------------------------------------------------------------------------------------------------ ranking


class Positions(nn.Module):
    """Logits Σ_i a_i w·E_i, so that the gradient at token i has the norm a_i‖w‖."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.table = weights, nn.Embedding(20, 4)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask, token_type_ids):
        scalar = self.table(input_ids).sum(-1) @ self.weights
        return torch.stack([scalar, -scalar], 1)


def drafts_for(texts):
    return [Draft(Words(text), CharacterAttack(0.5)) for text in texts]


def test_words_are_ranked_by_the_gradient_of_all_their_tokens():
    text = "the film was-good ."  # tokens: [CLS] the film was - good . [SEP]
    weights = torch.tensor([99.0, 3.0, 1.0, 2.0, 2.0, 2.0, 99.0, 99.0])
    model = TextModel(Positions(weights), word_tokenizer(["the", "film", "was", "good", "-"]))
    drafts = drafts_for([text])
    rank(drafts, model, torch.tensor([0]))
    assert [drafts[0].words[place] for place in drafts[0].order] == ["was-good", "the", "film"]  # √12 > 3 > 1


def test_words_beyond_the_longest_input_are_left():
    tokenizer = word_tokenizer(FILLER)
    model = TextModel(bert_for(tokenizer), tokenizer, max_length=5)
    text = "the film was boring and the plot"
    labels = own_labels(model, [text])
    (adversarial,) = CharacterAttack(1.0)(model, [text], labels)
    assert adversarial.split()[3:] == text.split()[3:]


def test_slow_tokenizers_are_refused():
    tokenizer = transformers.ByT5Tokenizer()
    model = TextModel(classifier("T5", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer)
    with pytest.raises(AttackError, match="tokenizer that tells each token's word; received ByT5Tokenizer"):
        CharacterAttack(0.4)(model, ["a fine film"], torch.tensor([0]))


# --------------------------------------------------------------------------------------------- texts of every kind


def test_texts_without_editable_words_come_back_unchanged(bytewise):
    labels = own_labels(bytewise, STRANGE)
    attack = CharacterAttack(1.0)
    assert attack(bytewise, STRANGE, labels) == STRANGE
    assert (attack.distance(bytewise, STRANGE, STRANGE) == 0).all()


def test_unicode_texts_stay_in_their_script(bytewise):
    labels = own_labels(bytewise, UNICODE)
    attack = CharacterAttack(1.0)
    adversarial = attack(bytewise, UNICODE, labels)
    assert adversarial != UNICODE and attack.distance(bytewise, UNICODE, adversarial).isfinite().all()
    for text, result in zip(UNICODE, adversarial, strict=True):
        changed_words(text, result)
        foreign = {c for c in text if not c.isascii()}
        assert {c for c in result if not c.isascii()} <= foreign
        assert [c for c in text if not c.isalpha()] == [c for c in result if not c.isalpha()]
    assert not re.search("[a-z]", adversarial[1] + adversarial[2])


@pytest.mark.parametrize("kind", [tuple, list])
def test_both_texts_of_a_pair_are_attacked_and_count_together(bytewise, kind):
    pairs = [kind(pair) for pair in (("two old dogs", "a young dog sleeps"), ("nobody", "somebody"), ("", "wonderful"))]
    labels = own_labels(bytewise, pairs)
    attack = CharacterAttack(0.3)
    adversarial = attack(bytewise, pairs, labels)
    assert {type(pair) for pair in adversarial} == {kind}
    changed = [sum(map(changed_words, *pair)) for pair in zip(pairs, adversarial, strict=True)]
    assert max(changed) > 0 and changed[0] <= 2 and changed[1] <= 1 and adversarial[2][0] == ""
    everything = CharacterAttack(1.0, candidates=4)(bytewise, pairs, labels)
    assert any(a[0] != b[0] for a, b in zip(pairs, everything, strict=True))
    assert any(a[1] != b[1] for a, b in zip(pairs, everything, strict=True))
    assert (attack.distance(bytewise, pairs, adversarial) <= 0.3 + 1e-6).all()


def test_distance_is_infinite_where_more_than_words_changed(bytewise):
    before = ["a fine film", "a fine film", "a fine film", "a - film", "a fine film"]
    after = ["a fine film", "a fine", "a  fine film", "a + film", "an fyne film"]
    distance = CharacterAttack(0.5).distance(bytewise, before, after)
    torch.testing.assert_close(distance, torch.tensor([0, torch.inf, torch.inf, torch.inf, 2 / 3]))
    assert CharacterAttack(0.0).distance(bytewise, ["a film"], ["a fylm"]).item() == 0.5


# -------------------------------------------------------------------------------------- what stays as it was, errors


def test_the_model_is_left_as_it_was(bytewise):
    model = bytewise.model.train()
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    texts, labels = ["a fine film", "dull"], torch.tensor([0, 1])
    first = CharacterAttack(0.5)(bytewise, texts, labels)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert CharacterAttack(0.5)(bytewise, texts, labels) == first
    assert all(module.training for module in model.modules()) and (last.grad == 1).all()
    assert [parameter.grad is None for parameter in model.parameters()].count(False) == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_errors(bytewise):
    labels = torch.zeros(1, dtype=torch.long)
    with pytest.raises(AttackError, match=r"epsilon must be a share of words, in \[0, 1\]; received 10"):
        CharacterAttack(10)
    for options in ({"edits": 0}, {"candidates": 0}):
        with pytest.raises(AttackError, match=r"edits and candidates must be ≥ 1; received edits=\d"):
            CharacterAttack(0.1, **options)
    with pytest.raises(AttackError, match="typos are made in texts; received a batch of token tensors"):
        CharacterAttack(0.1)(bytewise, dict(bytewise.encode(["a film"])), labels)
    with pytest.raises(AttackError, match="texts need a tokenizer"):
        CharacterAttack(0.1)(TextModel(bytewise.model), ["a film"], labels)
    with pytest.raises(AttackError, match="attacks on texts need a TextModel; received Bert"):
        CharacterAttack(0.1)(bytewise.model, ["a film"], labels)
