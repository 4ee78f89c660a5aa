"""`Samples`: a data set as attacks take it, images as pixels of [0, 1], texts as texts, and its labels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from hf_condlr.robustness.attacks import PixelModel, TextModel
from hf_condlr.robustness.attacks.base import Inputs, attacked, logits_of
from hf_condlr.robustness.evaluation.rows import (
    LABELS,
    TEXTS,
    as_8_bit,
    choose,
    class_numbers,
    match_classes,
    recognise,
    require,
    with_pictures,
)


class Samples:
    """The samples of a data set that are evaluated, and the model that takes them.

    Labels are the model's class numbers: where both know the names of their classes, these are matched.

    The first row tells the kind: pairs (pixels of [0, 1] or an image, label); `pixel_values` that an image processor
    has normalised; images; `input_ids`; one or two columns of text.

    Args:
        model: Gives logits; a `PixelModel` or `TextModel` is taken as it is.
        dataset: Has a length and rows by number: one of `datasets`, of torch, or a list.
        processor: The model's image processor, or its tokenizer.
        data_collator: Joins rows of `pixel_values` or `input_ids` to a batch; by default that of transformers.
        options: Further arguments, as `evaluate_robustness` describes them.

    Attributes:
        model: The attacked model: `PixelModel` for images, `TextModel` for texts.
        indices: Numbers of the samples in the data set, ascending.
        classes: The model's class number for each of the data set's; None where they agree.
        kind: Kind of the rows: `tensors`, `pixel_values`, `images`, `input_ids` or `texts`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        processor: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        image_column: str | None = None,
        text_columns: Sequence[str] | None = None,
        label_column: str | None = None,
        max_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset = with_pictures(dataset)
        self.indices = choose(dataset, max_samples, seed)
        row = self.dataset[self.indices[0]]
        self.label_column: Any = 1  # of a pair
        if isinstance(row, Mapping):
            self.label_column = label_column or next((name for name in LABELS if name in row), "")
        self.kind, self.columns = recognise(row, image_column, text_columns, self.label_column)
        # A processor of several kinds, as CLIP's, has one for images and one for texts.
        self.processor = getattr(processor, "tokenizer" if self.kind in TEXTS else "image_processor", processor)
        if isinstance(row, Mapping):
            rule = f"the data set must have a column of labels, {', '.join(LABELS)}, or label_column must name it"
            received, remedy = f"columns {', '.join(row)}", "Name it, or evaluate a split whose labels are known."
            require(self.label_column in row, rule, received, remedy)
        self.model: Any = self._attacked(model)
        rule = "images must be made into pixels by the model's image processor"
        remedy = "Give processor=AutoImageProcessor.from_pretrained(...), or rows of pixel_values."
        require(self.processor is not None or self.kind != "images", rule, "no processor", remedy)
        self.classes = match_classes(getattr(self.model, "model", model), dataset, self.label_column)
        self.data_collator = data_collator or (
            DataCollatorWithPadding(self.processor)
            if self.kind == "input_ids" and self.processor
            else default_data_collator
        )

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Sequence[int]) -> tuple[Inputs, Tensor]:
        """Inputs of the attacked model, and labels (B,), for positions among the samples."""
        rows = self._rows(positions)
        labels = class_numbers(rows, self.label_column)
        labels = labels if self.classes is None else torch.tensor(self.classes)[labels]
        return self._inputs(rows), labels.to(self.device)

    def data_labels(self, labels: Sequence[int]) -> list[int]:
        """The data set's class numbers for the model's."""
        return list(labels) if self.classes is None else [self.classes.index(label) for label in labels]

    def own_logits(self, positions: Sequence[int]) -> Tensor | None:  # -> (B, classes)
        """Logits of the model with its own preprocessing; None where the attacked model has no other."""
        rows, model = self._rows(positions), getattr(self.model, "model", None)
        if model is None or self.kind == "tensors" or (self.kind == "texts" and self.processor is None):
            return None
        if self.kind == "images":
            inputs = {"pixel_values": self._process([row[self.columns[0]] for row in rows])}
        elif self.kind == "texts":
            columns = [[row[name] for row in rows] for name in self.columns]
            limit = getattr(self.model, "max_length", None)
            options = {"padding": len(rows) > 1, "truncation": True, "max_length": limit, "return_tensors": "pt"}
            inputs = self.processor(*columns, **options)
        else:
            inputs = self._collate(rows)
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(self.device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        return logits_of(model(inputs["pixel_values"]) if "pixel_values" in inputs else model(**inputs))

    def fingerprint(self, batch_size: int) -> str:
        """Digest of the first and the last batch of inputs and labels, and of the largest logit to two digits.

        It differs for another normalisation, column, configuration or content of the data.
        """
        digest = hashlib.sha256()
        for start in (0, max(0, len(self) - batch_size)):
            inputs, labels = self.batch(range(start, min(start + batch_size, len(self))))
            with attacked(self.model), torch.no_grad():
                largest = self.model(inputs).abs().max().item()
            digest.update(contents(inputs) + contents(labels) + f"{largest:.2g}".encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def digest(self, labels: Sequence[int]) -> str:
        """Digest of the choice of samples: equal digests in reports of different models mean the same samples.

        It covers places, labels and, where they do not depend on a model as tokens do, the contents of 64 samples.
        """
        digest = hashlib.sha256(repr((len(self.dataset), self.indices, list(labels))).encode())
        for row in self._rows(range(min(64, len(self)))) if self.kind in ("tensors", "images", "texts") else []:
            for value in [row[0]] if self.kind == "tensors" else [row[name] for name in self.columns]:
                digest.update(value.tobytes() if isinstance(value, Image) else contents(value))
        return digest.hexdigest()

    def _attacked(self, model: nn.Module) -> nn.Module:
        if isinstance(model, (PixelModel, TextModel)):
            return model
        if self.kind in TEXTS:
            return TextModel(model, self.processor)
        if self.kind == "tensors" and self.processor is None:
            return PixelModel(model)
        rule = "images are attacked as pixels of [0, 1], and their normalisation must be known"
        remedy = "Give processor=AutoImageProcessor.from_pretrained(...), or PixelModel(model, mean, std)."
        require(self.processor is not None, rule, f"{self.kind} and no image processor", remedy)
        return PixelModel.from_processor(model, self.processor)

    def _rows(self, positions: Sequence[int]) -> list[Any]:
        numbers = [self.indices[i] for i in positions]
        if hasattr(self.dataset, "__getitems__"):  # `datasets` transforms a batch at once
            return self.dataset.__getitems__(numbers)
        return [self.dataset[i] for i in numbers]

    def _inputs(self, rows: list[Any]) -> Inputs:
        if self.kind == "tensors":
            return torch.stack([torch.as_tensor(row[0]) for row in rows]).to(self.device)
        if self.kind == "images":
            pixels = self._process([row[self.columns[0]] for row in rows], do_normalize=False)
            return pixels.clamp(0, 1).to(self.device)  # cubic resampling overshoots
        if self.kind == "texts":
            texts = [tuple(row[name] for name in self.columns) for row in rows]
            return texts if len(self.columns) == 2 else [text for (text,) in texts]
        inputs = self._collate(rows)
        if self.kind == "pixel_values":
            return self.model.denormalize(inputs["pixel_values"].to(self.device))
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _process(self, images: list[Image], **options: Any) -> Tensor:  # -> (B, C, H, W)
        channels = getattr(getattr(getattr(self.model, "model", self.model), "config", None), "num_channels", None)
        converted = [as_8_bit(image, channels) for image in images]
        return self.processor(converted, return_tensors="pt", **options)["pixel_values"]

    def _collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """Tensors that the model's forward takes, without the labels."""
        parameters = inspect.signature(self.model.model.forward).parameters
        taken = {*parameters, *LABELS, self.kind}  # as Trainer, which drops all others
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            taken |= {"attention_mask", "token_type_ids"}  # PEFT and torch.compile do not name what they pass on
        batch = self.data_collator([{name: row[name] for name in row if name in taken} for row in rows])
        return {name: value for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)}


def contents(inputs: Inputs) -> bytes:
    """The contents of a batch or a part of it, as bytes to be hashed."""
    if isinstance(inputs, Mapping):
        return b"".join(name.encode() + contents(value) for name, value in sorted(inputs.items()))
    return inputs.detach().cpu().float().numpy().tobytes() if isinstance(inputs, Tensor) else repr(inputs).encode()
