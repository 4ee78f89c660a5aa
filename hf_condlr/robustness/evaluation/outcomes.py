"""The files of an evaluation: each batch's outcome, from which it is resumed, and adversarial examples as parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from accelerate.utils import gather_object
from torch import Tensor

from hf_condlr.files import replacing
from hf_condlr.robustness.attacks.base import Inputs


@dataclass
class AttackOutcome:
    """Outcome of one attack on one batch."""

    survived: list[bool]
    """For each sample: classified correctly without the attack and under it."""
    survived_rounded: list[bool] | None = None
    """The same after pixels were rounded to 8 bits; None where there are no pixels."""
    moved: float | None = None
    """The largest distance of a sample, in units of the attack's epsilon; None where it is not measured."""
    outside: float = 0.0
    """Largest excess of a value over [0, 1], of pixels."""
    seconds: float = 0.0


@dataclass
class BatchOutcome:
    """Labels, correctness without an attack, and the outcome of each attack, in the order of the attacks."""

    labels: list[int]
    correct: list[bool]
    attacks: list[AttackOutcome] = field(default_factory=list)
    digest: str = ""
    """Digest of inputs and labels."""


class Outcomes:
    """{number of the batch: outcome}, and the folder that keeps them.

    Args:
        folder: Folder for each batch's outcome, written as soon as it is known; None for no folder. Outcomes of an
            interrupted evaluation are read from it. Processes must see the same folder to share it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.batches: dict[int, BatchOutcome] = {}
        for path in sorted(folder.glob("[0-9]*.json")) if folder is not None else []:
            values = json.loads(path.read_text(encoding="utf-8"))
            attacks = [AttackOutcome(**attack) for attack in values.pop("attacks")]
            self.batches[int(path.stem)] = BatchOutcome(**values, attacks=attacks)

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


def write_examples(
    path: Path, indices: Sequence[int], labels: Sequence[int], predictions: Sequence[int], adversarial: Inputs
) -> None:
    """A row for each attacked sample: `index` in the data set, `label`, `prediction` under attack, and the example.

    The example is `pixels` (channels, height, width) in float32, `text` (and `text_pair`), or the token tensors with
    their `perturbation`. `datasets.load_dataset(folder)` reads them.
    """
    columns = {"index": pa.array(indices), "label": pa.array(labels), "prediction": pa.array(predictions)}
    if isinstance(adversarial, Tensor):
        columns["pixels"] = _nested(adversarial)
    elif isinstance(adversarial, Mapping):
        columns |= {name: _nested(value) for name, value in adversarial.items()}
    elif isinstance(adversarial[0], str):
        columns["text"] = pa.array(adversarial)
    else:
        first, second = zip(*adversarial, strict=True)
        columns |= {"text": pa.array(first), "text_pair": pa.array(second)}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _nested(values: Tensor) -> pa.Array:  # (B, ...) -> B lists of lists
    """A pyarrow array, made without a Python object for each number."""
    values = values.detach().cpu()
    array = pa.array(values.reshape(-1).numpy())
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array
