"""Typing errors: what one slip of the fingers makes of a word, after DeepWordBug (Gao et al. 2018)."""

from __future__ import annotations

from itertools import pairwise, zip_longest
from random import Random

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    letter: [
        ROWS[y][x]
        for y, x in ((row, i - 1), (row, i + 1), (row - 1, i), (row - 1, i + 1), (row + 1, i - 1), (row + 1, i))
        if 0 <= y < len(ROWS) and 0 <= x < len(ROWS[y])
    ]
    for row, letters in enumerate(ROWS)
    for i, letter in enumerate(letters)
}
"""Keys beside each other on a QWERTY keyboard, whose rows are shifted by half a key."""


def typos(word: str, number: int, random: Random) -> list[str]:
    """At most `number` different words, one slip away from `word`, of all kinds in turn.

    Two neighbouring letters swapped, a letter deleted (never the last one), inserted beside another, or substituted.
    What is no letter stays; spaces are neither made nor removed, so that a word stays one word.
    """
    letters = [i for i, character in enumerate(word) if character.isalpha()]
    swaps = [word[:i] + word[j] + word[i] + word[j + 1 :] for i, j in pairwise(letters) if j == i + 1]
    deletions = [word[:i] + word[i + 1 :] for i in letters] if len(letters) > 1 else []
    insertions = [word[: i + 1] + new + word[i + 1 :] for i in letters for new in (word[i], *nearby(word[i], word))]
    substitutions = [word[:i] + new + word[i + 1 :] for i in letters for new in nearby(word[i], word)]
    kinds = [swaps, deletions, insertions, substitutions]
    for kind in kinds:
        random.shuffle(kind)
    found = dict.fromkeys(typo for group in zip_longest(*kinds) for typo in group if typo not in (None, word))
    return list(found)[:number]


def nearby(letter: str, word: str) -> list[str]:
    """Letters of the same case that a finger hits instead: neighbours on the keyboard, else others of the word."""
    if letter.lower() in NEIGHBOURS:
        return [key.upper() if letter.isupper() else key for key in NEIGHBOURS[letter.lower()]]
    others = dict.fromkeys(other for other in word if other.isalpha() and other.isupper() == letter.isupper())
    return [other for other in others if other != letter and other.lower() not in NEIGHBOURS]
