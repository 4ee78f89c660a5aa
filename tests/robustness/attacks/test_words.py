"""`Words` and `typos`."""

import random
import re

import pytest

from hf_condlr.robustness.attacks.words import NEIGHBOURS, Words, typos

STRANGE = ["", " ", "...", "a", "I !", "7 42", "☃ 🎬", "\t\n", "x - y"]
UNICODE = [
    "naïve Übergrößen façade",
    "очень хороший фильм",
    "とても良い映画 でした",
    "e\u0301clat de\u0301ja\u0300 vu",
    "great🎬film don't well-made",
    "  spaced\u00a0out\twords \n here ",
]


@pytest.mark.parametrize("text", [*STRANGE, *UNICODE, " a b", ("one two", ""), ("x", "y\nz")])
def test_words_can_be_put_together_again(text):
    words = Words(text)
    assert words.text() == text
    for part, whole in enumerate([text] if isinstance(text, str) else text):
        for i, character in enumerate(whole):
            assert character in words[words.place(part, i)]


def slips(word, typo):
    """Whether `typo` is one swap of neighbours, deletion, insertion or substitution away from `word`."""
    start = next((i for i, (c, d) in enumerate(zip(word, typo, strict=False)) if c != d), min(len(word), len(typo)))
    rest, other = word[start:], typo[start:]
    return (
        rest[1:] == other  # deletion
        or rest == other[1:]  # insertion
        or rest[1:] == other[1:]  # substitution
        or (rest[1:2] + rest[:1] == other[:2] and rest[2:] == other[2:])  # swap
    )


@pytest.mark.parametrize(
    "word", ["film", "It", "don't", "well-made", "AAA", "ß", "Übergröße", "好い映画", "x2y", "(no)."]
)
def test_typos_are_one_slip_away(word):
    found = typos(word, 1000, random.Random(0))
    assert found and len(set(found)) == len(found) and word not in found
    assert all(slips(word, typo) and any(map(str.isalpha, typo)) and not re.search(r"\s", typo) for typo in found)
    signs = [c for c in word if not c.isalpha()]
    assert all([c for c in typo if not c.isalpha()] == signs for typo in found)
    assert (
        typos(word, 3, random.Random(1)) == typos(word, 3, random.Random(1))
        and len(typos(word, 2, random.Random(0))) <= 2
    )
    if len(word) > 3 and word.isascii():
        lengths = [len(typo) - len(word) for typo in typos(word, 4, random.Random(0))]
        assert sorted(lengths) == [-1, 0, 0, 1]  # a kind each


def test_keyboard_neighbours_are_mutual_and_keep_their_case():
    assert sorted(NEIGHBOURS["g"]) == ["b", "f", "h", "t", "v", "y"]
    assert all(letter in NEIGHBOURS[other] for letter, others in NEIGHBOURS.items() for other in others)
    assert all(typo.isupper() for typo in typos("GOOD", 1000, random.Random(0)))
