"""Causal language models."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_condlr.compression.task import TextTask
from hf_condlr.scripts.checks import check, check_data
from hf_condlr.scripts.dataset_columns import is_string
from hf_condlr.scripts.packing import pack_texts

BLOCK_SIZE = 512  # tokens of a sample, at most, where the model takes more


class LanguageModeling(TextTask):
    """Column `text`; documents joined and cut into blocks, each ended by the end-of-text token."""

    metric, batch_size, calibration_samples, rank_multiple = "perplexity", 4, 256, 8
    tau = math.inf  # every layer would be factored, which costs more than the bound itself

    def _prepare(self, model: PreTrainedModel) -> None:
        super()._prepare(model)
        check(self.args.label_column is None, "a language model has no labels", self.args.label_column, "Leave it out.")
        self.block_size = self.args.max_length or min(self.limit or BLOCK_SIZE, BLOCK_SIZE)
        check(self.block_size >= 2, "max_length must be ≥ 2", self.block_size, "A token predicts the next.")

    def columns(self, data: DatasetDict) -> DatasetDict:
        features = data["train"].features
        [name, *more] = self.text_columns(features, lambda _, kind: is_string(kind), "text")
        check_data(not more, "a language model reads one column of text", ", ".join(more), "Name one.")
        names = {name: "text", "source_row": "source_row"}
        return data.select_columns(list(names)).rename_columns(names)

    def inputs(self, rows: Dataset, most: int | None = None, *, shuffle: bool = False) -> Dataset:
        rows = rows.shuffle(seed=self.args.seed) if shuffle else rows
        return pack_texts(rows, self.processor, self.block_size, rows.split or "given", most=most)

    def calibration_data(self, train: Dataset) -> DataLoader[Any]:
        """One block at a time: what the backward pass keeps of a batch is more than all second moments."""
        blocks: Any = self.inputs(train, self.calibration_samples, shuffle=True)
        return DataLoader(blocks, batch_size=self.args.batch_size or 1, collate_fn=self.collator)

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[float, int]:
        """Summed loss of the predicted tokens, and their number: position t predicts t + 1."""
        wide, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return float(cross_entropy(wide, targets, reduction="sum")), int((targets != -100).sum())

    def quality(self, total: float, number: int) -> float:
        return math.exp(min(total / number, 700.0)) if math.isfinite(total) else math.nan  # more is no float

    def drop(self, before: float, after: float) -> float:
        return 100 * (after / before - 1)
