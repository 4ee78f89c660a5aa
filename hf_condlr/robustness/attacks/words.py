"""`Words`, a text split into words that can be replaced, and `typos` of a word."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise, zip_longest
from random import Random
from types import MappingProxyType
from typing import Any

from hf_condlr.robustness.attacks.text import Text

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

# Neighbouring keys on a QWERTY keyboard, whose rows are shifted by half a key.
NEIGHBOURS = {
    letter: [
        ROWS[y][x]
        for y, x in ((row, i - 1), (row, i + 1), (row - 1, i), (row - 1, i + 1), (row + 1, i - 1), (row + 1, i))
        if 0 <= y < len(ROWS) and 0 <= x < len(ROWS[y])
    ]
    for row, letters in enumerate(ROWS)
    for i, letter in enumerate(letters)
}

Place = tuple[int, int]  # of a piece: the part of a pair, 0 or 1, and the number of the piece in it


def typos(word: str, number: int, random: Random) -> list[str]:
    """At most `number` different words, one typing error away from `word`, of all kinds in turn.

    Two neighbouring letters swapped, a letter deleted (never the last one), inserted next to another, or substituted.
    Other characters stay, and no space is inserted, so that a word stays one word.
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
    """Letters of the same case to type by mistake: neighbours on the keyboard, else other letters of the word."""
    if letter.lower() in NEIGHBOURS:
        return [key.upper() if letter.isupper() else key for key in NEIGHBOURS[letter.lower()]]
    others = dict.fromkeys(other for other in word if other.isalpha() and other.isupper() == letter.isupper())
    return [other for other in others if other != letter and other.lower() not in NEIGHBOURS]


class Words:
    """A text, or a pair of texts, as pieces: runs of whitespace, and the text between them.

    A word is a piece with a letter or a digit; it is editable if it has at least two letters.
    """

    def __init__(self, text: Text) -> None:
        self._join: Callable[[list[str]], Any] = "".join if isinstance(text, str) else type(text)
        self.parts = [re.split(r"(\s+)", part) for part in ([text] if isinstance(text, str) else text)]
        places = [(part, piece) for part, pieces in enumerate(self.parts) for piece in range(len(pieces))]
        self.places = [place for place in places if any(map(str.isalnum, self[place]))]
        self.editable = [place for place in self.places if sum(map(str.isalpha, self[place])) > 1]
        self._ends = [list(accumulate(map(len, pieces))) for pieces in self.parts]

    def __getitem__(self, place: Place) -> str:
        return self.parts[place[0]][place[1]]

    def text(self, changes: Mapping[Place, str] = MappingProxyType({})) -> Text:
        """The text, with words replaced by `changes`."""
        return self._join(
            [
                "".join(changes.get((part, piece), old) for piece, old in enumerate(pieces))
                for part, pieces in enumerate(self.parts)
            ]
        )

    def place(self, part: int, character: int) -> Place:
        """The piece that contains this character of the part."""
        return part, bisect_right(self._ends[part], character)

    def changed(self, other: Words) -> list[Place] | None:
        """Words that differ in `other`; None if anything but words differs."""
        if [len(pieces) for pieces in self.parts] != [len(pieces) for pieces in other.parts]:
            return None
        differ = [
            (part, piece)
            for part, pieces in enumerate(self.parts)
            for piece, old in enumerate(pieces)
            if old != other[part, piece]
        ]
        return differ if set(differ) <= set(self.places) else None
