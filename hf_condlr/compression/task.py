"""`Task`: what a model's class decides, namely the columns it reads, how inputs are made, what quality means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from hf_condlr.compression.arguments import InputArguments
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.text import positions
from hf_condlr.robustness.evaluation.rows import choose
from hf_condlr.scripts.checks import check
from hf_condlr.scripts.dataset_columns import find_column


class Task:
    """A task of `tasks.TASKS`, for one model and its processor.

    Attributes:
        metric: Name of the quality, which `quality` measures: `accuracy`, or `perplexity`.
        kind: Kind of the attacks' inputs, `pixels` or `texts`; None where nothing is attacked.
        batch_size, calibration_samples: Those of the arguments, or the task's own.
        tau, rank_multiple: Those of the conversion, where none are given.
        robust_epsilon, robust_learning_rate: Those of a robust recovery, where none are given; None where nothing is
            attacked.
    """

    metric = "accuracy"
    kind: str | None = None
    batch_size = 32
    calibration_samples = 1024
    tau = 4.0
    rank_multiple = 1
    robust_epsilon: float | None = None
    robust_learning_rate: float | None = None

    def __init__(self, model: PreTrainedModel, processor: Any, args: InputArguments) -> None:
        rule, remedy = "the model's inputs are made by its processor", "Pass processor=AutoProcessor.from_pretrained()."
        check(processor is not None, rule, "processor=None", remedy)
        self.processor: Any = processor
        self.args, self.config = args, model.config
        self.taken = set(inspect.signature(model.forward).parameters)
        self.batch_size = args.batch_size or self.batch_size
        self.calibration_samples = args.calibration_samples or self.calibration_samples
        self.collator: Callable[[list[Any]], dict[str, Any]] = default_data_collator
        self._prepare(model)

    def columns(self, data: DatasetDict) -> DatasetDict:
        """The columns that are used, under fixed names; labels are the model's class numbers.

        Raises:
            EvaluationError: Columns are missing, or labels do not fit the model.
        """
        raise NotImplementedError

    def inputs(self, rows: Dataset, most: int | None = None, *, shuffle: bool = False) -> Dataset:
        """What the model takes of rows that `columns` returned: at most so many, drawn with the seed."""
        if shuffle:
            rows = rows.shuffle(seed=self.args.seed)
            rows = rows if most is None else rows.take(min(most, len(rows)))
        elif most is not None:
            rows = rows.select(choose(rows, most, self.args.seed))
        return rows.with_transform(self._transform)

    def calibration_data(self, train: Dataset) -> DataLoader[Any]:
        """Batches of `calibration_samples` rows of the training split, drawn with the seed."""
        rows: Any = self.inputs(train, self.calibration_samples, shuffle=True)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.collator)

    def attacks(self) -> list[Attack]:
        """The attacks of the report where none are given."""
        return []

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[float, int]:
        """What `quality` sums up over batches: correct predictions, and how many there are; -100 does not count."""
        known = labels != -100
        return float((logits.argmax(-1)[known] == labels[known]).sum()), int(known.sum())

    def quality(self, total: float, number: int) -> float:
        """The metric from the sums of `counts`."""
        return total / number

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is: in points of accuracy, or in percent of the perplexity."""
        return 100 * (before - after)

    def _prepare(self, model: PreTrainedModel) -> None:
        """Checks the model, and chooses what joins rows to a batch."""

    def _transform(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        raise NotImplementedError


class TextTask(Task):
    """What tasks on texts share: a tokenizer and its limit."""

    def _prepare(self, model: PreTrainedModel) -> None:
        self.processor = getattr(self.processor, "tokenizer", self.processor)
        check(self.args.image_column is None, "image_column is for images", self.args.image_column, "Leave it out.")
        limits = (getattr(self.processor, "model_max_length", None), positions(model))
        limit = min((limit for limit in limits if limit and limit < 1e9), default=None)  # 1e30: no limit
        rule, remedy = "max_length must be what the model takes", "Leave it out, or lower it."
        fits = self.args.max_length is None or limit is None or self.args.max_length <= limit
        check(fits, f"{rule}, {limit} at most", self.args.max_length, remedy)
        self.limit = self.args.max_length or limit

    def text_columns(self, features: Mapping[str, Any], matches: Callable[[str, Any], bool], kind: str) -> list[str]:
        """The columns that are given, or the only one that matches."""
        given = self.args.text_columns
        return given or [find_column(features, "text_columns", None, matches, kind)]

    def _taken(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in encoded.items() if name in self.taken}
