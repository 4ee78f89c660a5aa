"""Adversarial examples as parquet, a file for each batch, exactly as the model received them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch import Tensor

from hf_condlr.files import replacing
from hf_condlr.robustness.attacks.base import Inputs


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
