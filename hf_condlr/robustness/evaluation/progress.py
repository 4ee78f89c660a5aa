"""`Progress`: what runs and how long it will take, as a bar in a terminal and as lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

FIRST, INTERVAL = 5.0, 30.0  # seconds until the first estimate, and between two
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"


class Progress:
    """A bar in a terminal. Elsewhere lines at the start, after the first seconds, every half minute, and at the end.

    Args:
        title: Name of the task that is shown.
        total: Amount of work.
        show: False shows nothing.
    """

    def __init__(self, title: str, total: float, *, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self.title, self.total, self.done = title, total, 0.0
        self.bar = tqdm(total=total, desc=title, disable=not (show and terminal), bar_format=BAR)
        self.lines = show and not terminal and total > 0
        self.started = time.monotonic()
        self.last = self.started + FIRST - INTERVAL

    def __enter__(self) -> Self:
        self._say("started")
        return self

    def advance(self, amount: float = 1.0) -> None:
        """Count an amount of work as done."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.done < self.total and now - self.last >= INTERVAL:
            left = (now - self.started) * (self.total / self.done - 1)
            self._say(f"{self.done / self.total:.0%} after {now - self.started:.0f} s, about {left:.0f} s left")
            self.last = now

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.bar.close()
        if kind is None:
            self._say(f"finished after {time.monotonic() - self.started:.0f} s")

    def _say(self, text: str) -> None:
        if self.lines:
            sys.stderr.write(f"{self.title}: {text}\n")
            sys.stderr.flush()
