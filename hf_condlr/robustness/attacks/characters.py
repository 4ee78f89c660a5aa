"""`CharacterAttack`: typing errors in the words that matter most, after DeepWordBug (Gao et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import score_and_gradient
from hf_condlr.robustness.attacks.base import Attack, attacked, require
from hf_condlr.robustness.attacks.embeddings import TokenBall
from hf_condlr.robustness.attacks.losses import scores
from hf_condlr.robustness.attacks.text import Text, TextModel, require_text_model, require_texts
from hf_condlr.robustness.attacks.words import Place, Words, typos

LEAST_BATCH = 32  # texts for one call of the model, or the size of the attacked batch if that is larger


@dataclass(frozen=True)
class CharacterAttack(Attack):
    """Typing errors in at most max(1, ⌊ε · words⌋) words of a text, in none at ε = 0.

    Words, separated by whitespace, are ranked once, by the norm of the margin's gradient at the embeddings of their
    tokens. Then each word in turn gets the best of a few `typos` if it raises the margin max_{j≠y} z_j − z_y, until the
    text is misclassified or the budget is used. Words that no typo helps and words of fewer than two letters stay. Both
    texts of a pair are attacked; their words count together.

    There is no guarantee that the meaning stays: "bad" and "bed" are one typo apart. The search is greedy: other typos
    may do more harm.

    Args:
        epsilon: Share of a text's words that may be changed, in [0, 1].
        edits: Largest number of typos in one word, each the best on top of the last.
        candidates: Number of typos that each is chosen from.
        seed: Seed of the candidates, which depend on it and the text alone, not on the text's batch.
    """

    epsilon: float = 0.2
    edits: int = 1
    candidates: int = 16
    seed: int = 0
    takes: ClassVar[Literal["pixels", "tokens", "texts"]] = "texts"
    name = threat = "characters"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon <= 1, "epsilon must be a share of words, in [0, 1]", self.epsilon, "0.1 means 10 %.")
        received = f"edits={self.edits}, candidates={self.candidates}"
        require(min(self.edits, self.candidates) >= 1, "edits and candidates must be ≥ 1", received, "Raise them.")

    def reseeded(self, index: int) -> Self:
        return self  # random numbers depend on the text, not on its batch

    def __call__(self, model: nn.Module, inputs: Sequence[Text], labels: Tensor) -> list[Text]:
        """The texts, or pairs, with typos; the model is a `TextModel`."""
        model = require_text_model(model)
        remedy = "Pass the list of texts, or of pairs, that they were made from."
        are_texts = not isinstance(inputs, (Mapping, Tensor))
        require(are_texts, "typos are made in texts", "a batch of token tensors", remedy)
        require_texts(inputs)
        fast = getattr(model.tokenizer, "is_fast", True)
        rule, remedy = "typos need a tokenizer that tells each token's word", "Load the fast tokenizer of this model."
        require(fast, rule, type(model.tokenizer).__name__, remedy)
        drafts = [Draft(Words(text), self) for text in inputs]
        with attacked(model):
            rank(drafts, model, labels)
            searches = [draft.search() for draft in drafts]
            answers: dict[int, list[float] | None] = dict.fromkeys(range(len(drafts)))
            while answers:
                asked = {i: texts for i, answer in answers.items() if (texts := resume(searches[i], answer))}
                answers = {**margins_of(model, labels, asked)}
        return [draft.words.text(draft.changes) for draft in drafts]

    def budget(self, words: int) -> int:
        """How many of `words` words may be changed: at least one, or short texts would be safe at any small ε."""
        return max(1, math.floor(self.epsilon * words + 1e-9)) if self.epsilon > 0 else 0

    def distance(self, model: nn.Module, inputs: Sequence[Text], adversarial: Sequence[Text]) -> Tensor:  # -> (B,)
        """Share of words changed; a single one, allowed at every ε > 0, counts at most ε.

        It is inf for a text that differs in more than its words.
        """
        shares = []
        for before, after in zip(map(Words, inputs), map(Words, adversarial), strict=True):
            changed = before.changed(after)
            share = math.inf if changed is None else len(changed) / max(len(before.places), 1)
            free = changed is not None and len(changed) == 1 and self.epsilon > 0
            shares.append(min(share, self.epsilon) if free else share)
        return torch.tensor(shares)


@dataclass
class Draft:
    """A text under attack, and what is known of it."""

    words: Words
    attack: CharacterAttack
    margin: float = math.inf
    """max_{j≠y} z_j − z_y of the current text, inf once it is misclassified."""
    order: list[Place] = field(default_factory=list)
    """Words to change, the most promising first."""
    changes: dict[Place, str] = field(default_factory=dict)

    def search(self) -> Generator[list[Text], list[float] | None, None]:
        """Yield texts to choose from, and receive their margins."""
        budget = self.attack.budget(len(self.words.places))
        random = Random(f"{self.attack.seed} {self.words.text()!r}")
        for place in self.order:
            for _ in range(self.attack.edits):
                if self.margin == math.inf or len(self.changes.keys() | {place}) > budget:
                    return
                word = self.changes.get(place, self.words[place])
                found = [typo for typo in typos(word, self.attack.candidates, random) if typo != self.words[place]]
                margins = yield [self.words.text({**self.changes, place: typo}) for typo in found]
                if not margins or max(margins) <= self.margin:
                    break
                self.margin = max(margins)
                self.changes[place] = found[margins.index(self.margin)]


def resume(search: Generator[list[Text], list[float] | None, None], margins: list[float] | None) -> list[Text] | None:
    """The texts that a search yields after `margins` (None at its start); None at its end."""
    try:
        return search.send(margins)
    except StopIteration:
        return None


@torch.no_grad()
def margins_of(model: TextModel, labels: Tensor, asked: Mapping[int, Sequence[Text]]) -> dict[int, list[float]]:
    """{sample: texts} ↦ {sample: margins}, inf for the misclassified."""
    size = max(len(labels), LEAST_BATCH)
    rows = [(sample, text) for sample, texts in asked.items() for text in texts]
    values = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len("".join(rows[row][1])))  # similar lengths: little padding
    for chunk in (order[start : start + size] for start in range(0, len(order), size)):
        logits = model([rows[row][1] for row in chunk])
        own = labels[[rows[row][0] for row in chunk]].to(logits.device)
        for row, value in zip(chunk, scores(logits, own, "margin").tolist(), strict=True):
            values[row] = value
    remaining = iter(values)
    return {sample: [next(remaining) for _ in texts] for sample, texts in asked.items()}


def rank(drafts: Sequence[Draft], model: TextModel, labels: Tensor) -> None:
    """Rank words by ‖∇margin‖₂ at their tokens' embeddings; words beyond the longest input are left out."""
    encoded = model.encode([draft.words.text() for draft in drafts])
    ball = TokenBall(model, encoded, 0.0)
    values, gradient = score_and_gradient(ball.logits, ball.zero(), labels.to(ball.radius.device), "margin")
    squares = gradient.square().sum(-1).tolist()
    for draft, margin, encoding, row in zip(drafts, values.tolist(), encoded.encodings, squares, strict=True):
        weight: dict[Place, float] = {}
        for part, (start, end), square in zip(encoding.sequence_ids, encoding.offsets, row, strict=True):
            if part is not None and start < end:
                place = draft.words.place(part, end - 1)  # a token may begin with the space before its word
                weight[place] = weight.get(place, 0.0) + square
        draft.margin = margin
        draft.order = sorted(weight.keys() & set(draft.words.editable), key=lambda place: (-weight[place], place))
