"""`Words`: a text taken apart into words and what lies between them, so that words can be replaced."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from hf_condlr.attacks.text import Text

Place = tuple[int, int]
"""Of a piece: the part of a pair, 0 or 1, and the number of the piece in it."""


class Words:
    """A text, or a pair of texts, as pieces: runs of space, and what lies between them.

    A word is a piece that has a letter or a digit; it is editable if it has two letters at least.
    """

    def __init__(self, text: Text) -> None:
        self._whole: Callable[[list[str]], Any] = "".join if isinstance(text, str) else type(text)
        self.parts = [re.split(r"(\s+)", part) for part in ([text] if isinstance(text, str) else text)]
        places = [(part, piece) for part, pieces in enumerate(self.parts) for piece in range(len(pieces))]
        self.places = [place for place in places if any(map(str.isalnum, self[place]))]
        self.editable = [place for place in self.places if sum(map(str.isalpha, self[place])) > 1]
        self._ends = [list(accumulate(map(len, pieces))) for pieces in self.parts]

    def __getitem__(self, place: Place) -> str:
        return self.parts[place[0]][place[1]]

    def text(self, changes: Mapping[Place, str] = MappingProxyType({})) -> Text:
        """The text, with other words in some places."""
        return self._whole(
            [
                "".join(changes.get((part, piece), old) for piece, old in enumerate(pieces))
                for part, pieces in enumerate(self.parts)
            ]
        )

    def place(self, part: int, character: int) -> Place:
        """Of the piece that has this character of the part."""
        return part, bisect_right(self._ends[part], character)

    def changed(self, other: Words) -> list[Place] | None:
        """Words that differ in `other`; None if it differs in more than its words."""
        if [len(pieces) for pieces in self.parts] != [len(pieces) for pieces in other.parts]:
            return None
        differ = [
            (part, piece)
            for part, pieces in enumerate(self.parts)
            for piece, old in enumerate(pieces)
            if old != other[part, piece]
        ]
        return differ if set(differ) <= set(self.places) else None
