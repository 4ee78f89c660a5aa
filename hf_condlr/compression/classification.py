"""Classifiers of images, texts and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, DatasetDict, Image
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedModel

from hf_condlr.compression.arguments import InputArguments
from hf_condlr.compression.labels import match_labels, match_token_labels
from hf_condlr.compression.task import Task, TextTask
from hf_condlr.robustness.attacks import PGD, EmbeddingPGD, TextModel
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.rows import PAIRS, as_8_bit
from hf_condlr.scripts.checks import check, check_data
from hf_condlr.scripts.dataset_columns import find_column, is_string, labelled


class ImageClassification(Task):
    """Columns `image` and `labels`."""

    kind = "pixels"
    robust_epsilon, robust_learning_rate = 2 / 255, 3e-5

    def _prepare(self, model: PreTrainedModel) -> None:
        self.processor = getattr(self.processor, "image_processor", self.processor)
        check(self.args.max_length is None, "max_length is for texts", self.args.max_length, "Leave it out.")
        check(not self.args.text_columns, "text_columns is for texts", self.args.text_columns, "Leave it out.")

    def columns(self, data: DatasetDict) -> DatasetDict:
        features, given = data["train"].features, self.args.image_column
        image = find_column(features, "image_column", given, lambda _, kind: isinstance(kind, Image), "images")
        return match_labels(self.config, labelled(data, label_column(features, self.args), {image: "image"}))

    def attacks(self) -> list[Attack]:
        return [PGD(1 / 255, steps=10)]

    def _transform(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [as_8_bit(image, getattr(self.config, "num_channels", None)) for image in batch["image"]]
        return {**self.processor(images, return_tensors="pt"), "labels": batch["labels"]}


class TextClassification(TextTask):
    """Columns `text`, perhaps `text_pair`, and `labels`."""

    kind = "texts"
    robust_epsilon, robust_learning_rate = 0.05, 1e-4

    def _prepare(self, model: PreTrainedModel) -> None:
        super()._prepare(model)
        rule, remedy = "the tokenizer must have a token for padding", "Set tokenizer.pad_token."
        check(self.processor.pad_token is not None, rule, "none", remedy)
        TextModel(model, self.processor)  # refuses another token for padding in the model
        self.collator = DataCollatorWithPadding(self.processor)

    def columns(self, data: DatasetDict) -> DatasetDict:
        features = data["train"].features
        label = label_column(features, self.args)

        def is_text(name: str, kind: Any) -> bool:
            return is_string(kind) and name != label

        texts = [name for name in features if is_text(name, features[name]) and name != "source_row"]
        pair = list(texts) if tuple(texts) in PAIRS and self.args.text_columns is None else None
        texts = pair or self.text_columns(features, is_text, "text")
        right = all(name in features and is_text(name, features[name]) for name in texts)
        rule = "text_columns must be one or two columns of text"
        check_data(right and 1 <= len({*texts}) == len(texts) <= 2, rule, texts, f"Choose among {', '.join(features)}.")
        names = dict(zip(texts, ("text", "text_pair"), strict=False))
        return match_labels(self.config, labelled(data, label, names))

    def attacks(self) -> list[Attack]:
        return [EmbeddingPGD(0.02, steps=10)]

    def _transform(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in ("text", "text_pair") if name in batch]
        encoded = self.processor(*texts, truncation=self.limit is not None, max_length=self.limit)
        return self._taken(encoded) | {"labels": batch["labels"]}


class TokenClassification(TextTask):
    """Columns `words` and `labels`, lists of the same length."""

    def _prepare(self, model: PreTrainedModel) -> None:
        super()._prepare(model)
        rule, remedy = "words are matched to tokens by a fast tokenizer", "Load one of tokenizers, not of Python."
        check(getattr(self.processor, "is_fast", False), rule, type(self.processor).__name__, remedy)
        self.collator = DataCollatorForTokenClassification(self.processor)

    def columns(self, data: DatasetDict) -> DatasetDict:
        features, given = data["train"].features, self.args.label_column

        def are_words(name: str, kind: Any) -> bool:
            return is_string(getattr(kind, "feature", None))

        words = self.text_columns(features, are_words, "lists of words")[0]
        known = [name for name, kind in features.items() if isinstance(getattr(kind, "feature", None), ClassLabel)]
        candidates = [name for name in known if name in ("ner_tags", "labels", "tags")] or known
        candidates = candidates or [name for name in ("labels", "ner_tags", "tags") if name in features]
        label = find_column(
            features, "label_column", given, lambda name, _: name in candidates, "lists of class numbers"
        )
        names = {words: "words", label: "labels", "source_row": "source_row"}
        return match_token_labels(self.config, data.select_columns(list(names)).rename_columns(names))

    def _transform(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        limit: Any = {"truncation": self.limit is not None, "max_length": self.limit}
        encoded = self.processor(batch["words"], is_split_into_words=True, **limit)
        labels = []
        for i, row in enumerate(batch["labels"]):
            words = encoded.word_ids(i)  # of each token; the first token of a word has its label
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels.append([row[word] if new else -100 for word, new in zip(words, first, strict=True)])
        return self._taken(encoded) | {"labels": labels}


def label_column(features: Mapping[str, Any], args: InputArguments) -> str:
    """The column of labels: given, the only one of class labels, or one named label or labels."""
    known = any(isinstance(kind, ClassLabel) for kind in features.values())

    def is_label(name: str, kind: Any) -> bool:
        return isinstance(kind, ClassLabel) if known else name in ("label", "labels")

    return find_column(features, "label_column", args.label_column, is_label, "class labels")
