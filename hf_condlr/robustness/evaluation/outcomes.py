"""The outcome of each batch under each attack, kept in files so that an interrupted evaluation can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from accelerate.utils import gather_object

from hf_condlr.files import replacing


@dataclass
class AttackOutcome:
    """One attack on one batch."""

    survived: list[bool]
    """For each sample: classified correctly without the attack and under it."""
    survived_rounded: list[bool] | None = None
    """The same after pixels were rounded to 8 bits; None where there are no pixels."""
    moved: float | None = None
    """The largest distance of a sample, in units of the attack's epsilon; None where it is not measured."""
    outside: float = 0.0
    """Largest excess of a value over the bounds of the inputs."""
    seconds: float = 0.0


@dataclass
class BatchOutcome:
    """Labels, correctness without an attack, and the outcome of each attack, in the order of the attacks."""

    labels: list[int]
    correct: list[bool]
    attacks: list[AttackOutcome] = field(default_factory=list)
    digest: str = ""
    """Digest of inputs and labels."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From `asdict`."""
        return cls(**values | {"attacks": [AttackOutcome(**attack) for attack in values["attacks"]]})


class Outcomes:
    """{number of the batch: outcome}, and the folder that keeps them.

    Args:
        folder: Where each batch's outcome is written as soon as it is known; None for nowhere. Outcomes of an
            interrupted evaluation are read from it. Processes must see the same folder to share it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.batches: dict[int, BatchOutcome] = {}
        for path in sorted(folder.glob("[0-9]*.json")) if folder is not None else []:
            self.batches[int(path.stem)] = BatchOutcome.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def add(self, number: int, outcome: BatchOutcome) -> None:
        """Keep the outcome of a batch."""
        if self.batches.get(number) is outcome:
            return
        self.batches[number] = outcome
        if self.folder is not None:
            with replacing(self.folder / f"{number:06d}.json") as temporary:
                temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")

    def gather(self, mine: Iterable[int]) -> list[BatchOutcome]:
        """Outcomes of all batches, in order, on every process, from the batches `mine` of each process."""
        gathered = dict(pair for pairs in gather_object([[(i, self.batches[i]) for i in mine]]) for pair in pairs)
        self.batches = dict(sorted(gathered.items()))
        return list(self.batches.values())
