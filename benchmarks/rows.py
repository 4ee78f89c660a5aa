"""Rows of a long experiment, kept as JSON lines so that a second call goes on where the first one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Rows:
    """A file of JSON lines; a row is found again by its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row made with exactly these settings."""
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, key: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Append, and write at once, so that an interrupted experiment loses one run at most."""
        row = {"key": key, **result}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        return row
