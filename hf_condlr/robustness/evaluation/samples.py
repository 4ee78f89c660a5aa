"""`Samples`: a data set as attacks take it, images as pixels of [0, 1], texts as texts, and its labels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.attacks import PixelModel, TextModel
from hf_condlr.robustness.attacks.base import Inputs, attacked, logits_of

LABELS = ("labels", "label", "label_ids")


PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair")),
    *(("question", "sentence"), ("question", "passage"), ("question", "context"), ("text1", "text2")),
)


"""Columns that are both taken without being named: another second one may be an identifier."""


TEXTS = ("texts", "input_ids")


"""Kinds of rows that text attacks are for."""


class Samples:
    """The samples of a data set that are evaluated, and the model that takes them.

    Recognised by its first row are: pairs (pixels of [0, 1] or an image, label); `pixel_values` that an image processor
    has normalised; images; `input_ids`; and one or two columns of text.

    Args:
        model: Yields logits; a `PixelModel` or `TextModel` is taken as it is.
        dataset: With a length and rows by number: of `datasets`, torch, or a list.
        processor: The model's image processor, or its tokenizer.
        data_collator: Joins rows of `pixel_values` or `input_ids` to a batch; transformers' own by default.
        image_column: The only column of images if not given.
        text_columns: The only column of text, or a pair of usual names (`PAIRS`), if not given.
        label_column: `labels`, `label` or `label_ids` if not given.
        max_samples: So many, drawn once with `seed`; all if not given. Files often come sorted by class.
        seed: Of that choice.

    Attributes:
        model: The attacked model: `PixelModel` for images, `TextModel` for texts.
        indices: Numbers of the samples in the data set, ascending.
        kind: What the rows hold: `tensors`, `pixel_values`, `images`, `input_ids` or `texts`.
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
        self.dataset = _with_images(dataset)
        self.indices = _choose(dataset, max_samples, seed)
        row = self.dataset[self.indices[0]]
        self.label_column: Any = 1  # of a pair
        if isinstance(row, Mapping):
            self.label_column = label_column or next((name for name in LABELS if name in row), "")
        self.kind, self.columns = _recognise(row, image_column, text_columns, self.label_column)
        # A processor of several kinds, as CLIP's, has one for images and one for texts.
        self.processor = getattr(processor, "tokenizer" if self.kind in TEXTS else "image_processor", processor)
        if isinstance(row, Mapping) and self.label_column not in row:
            raise EvaluationError(
                f"the data set must have a column of labels, {', '.join(LABELS)}, or label_column must name it",
                received=f"columns {', '.join(map(str, row))}",
                remedy="Name it, or evaluate a split whose labels are known.",
            )
        self.model: Any = self._attacked(model)
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
        inputs, labels = self._inputs(rows), self._labels(rows)
        wrong = labels[(labels < 0)].tolist()
        if wrong:
            raise EvaluationError(
                "labels must be class numbers from 0",
                received=f"{wrong[0]} in the column {self.label_column!r}",
                remedy="Evaluate a split whose labels are known, without rows that have none.",
            )
        return inputs, labels.to(self.device)

    def own_logits(self, positions: Sequence[int]) -> Tensor | None:  # -> (B, classes)
        """Logits on the model's own way from a row, past the attacked model's; None where there is no other way."""
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
        """Of what the attacked model gets in the first and the last batch, and of what it gives, to two digits.

        Another normalisation, column, configuration or content of the data gives another one.
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
        """Of the model."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def digest(self, labels: Sequence[int]) -> str:
        """Names the samples: reports of different models with the same one speak of the same samples.

        Of places, labels and, where they are no model's own (tokens, normalised pixels), the contents of 64 samples.
        """
        digest = hashlib.sha256(repr((len(self.dataset), self.indices, list(labels))).encode())
        for row in self._rows(range(min(64, len(self)))) if self.kind in ("tensors", "images", "texts") else []:
            for value in [row[0]] if self.kind == "tensors" else [row[name] for name in self.columns]:
                digest.update(value.tobytes() if isinstance(value, Image) else contents(value))
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------- pieces

    def _attacked(self, model: nn.Module) -> nn.Module:
        if isinstance(model, (PixelModel, TextModel)):
            return model
        if self.kind in TEXTS:
            return TextModel(model, self.processor)
        if self.kind == "tensors" and self.processor is None:
            return PixelModel(model)
        if self.processor is None:
            raise EvaluationError(
                "images are attacked as pixels of [0, 1], and their normalisation must be known",
                received=f"{self.kind} and no image processor",
                remedy="Give processor=AutoImageProcessor.from_pretrained(...), or PixelModel(model, mean, std).",
            )
        return PixelModel.from_processor(model, self.processor)

    def _rows(self, positions: Sequence[int]) -> list[Any]:
        numbers = [self.indices[i] for i in positions]
        if hasattr(self.dataset, "__getitems__"):  # a data set of `datasets` transforms a batch at once
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
        if self.processor is None:
            raise EvaluationError(
                "images must be made into pixels by the model's image processor",
                received="no processor",
                remedy="Give processor=AutoImageProcessor.from_pretrained(...), or rows of pixel_values.",
            )
        config = getattr(getattr(self.model, "model", self.model), "config", None)
        mode = {1: "L", 3: "RGB"}.get(getattr(config, "num_channels", 0))  # else as the images are
        converted = [image.convert(mode or ("L" if image.mode == "L" else "RGB")) for image in images]
        pixels = self.processor(converted, return_tensors="pt", **options)["pixel_values"]
        return pixels

    def _collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """Tensors that the model's forward takes, without the labels."""
        parameters = inspect.signature(self.model.model.forward).parameters
        taken = {*parameters, *LABELS, self.kind}  # Trainer drops the others too
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            taken |= {"attention_mask", "token_type_ids"}  # PEFT and torch.compile do not name what they hand on
        batch = self.data_collator([{name: row[name] for name in row if name in taken} for row in rows])
        return {name: value for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)}

    def _labels(self, rows: list[Any]) -> Tensor:  # -> (B,)
        values = [row[self.label_column] for row in rows]
        try:
            labels = torch.as_tensor([value.item() if isinstance(value, Tensor) else value for value in values])
        except (TypeError, ValueError, RuntimeError):  # names, None, vectors
            labels = torch.empty(0)
        if labels.dim() != 1 or labels.is_floating_point():
            raise EvaluationError(
                "labels must be one class number a sample",
                received=f"values such as {str(values[0])[:50]}",
                remedy="Only classifiers of whole samples are attacked; class_encode_column makes numbers of names.",
            )
        return labels


def contents(inputs: Inputs) -> bytes:
    """Of a batch or a part of it, to be hashed."""
    if isinstance(inputs, Mapping):
        return b"".join(name.encode() + contents(value) for name, value in sorted(inputs.items()))
    return inputs.detach().cpu().float().numpy().tobytes() if isinstance(inputs, Tensor) else repr(inputs).encode()


def _choose(dataset: Any, max_samples: int | None, seed: int) -> list[int]:
    """Numbers of the samples to evaluate."""
    if isinstance(dataset, Mapping):
        names = ", ".join(map(str, dataset))
        raise EvaluationError("a data set must be one split", received=names, remedy="Choose one: data['test'].")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise EvaluationError(
            "a data set must have a length and rows by number",
            received=type(dataset).__name__,
            remedy="Take rows out of a stream first: Dataset.from_list(list(stream.take(1000))).",
        )
    if max_samples is not None and max_samples < 1:
        raise EvaluationError("max_samples must be ≥ 1", received=max_samples, remedy="None evaluates all.")
    if not len(dataset):
        raise EvaluationError("the data set must hold at least one sample", received="none", remedy="Another split.")
    if max_samples is None or max_samples >= len(dataset):
        return list(range(len(dataset)))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_samples]
    return sorted(chosen.tolist())


def _with_images(dataset: Any) -> Any:
    """Images as such, where a format of `datasets` would make arrays of them that no image processor has seen."""
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] in (None, "custom"):
        return dataset
    has_images = any(isinstance(feature, datasets.Image) for feature in dataset.features.values())
    return dataset.with_format(None) if has_images else dataset


def _recognise(
    row: Any, image_column: str | None, text_columns: Sequence[str] | None, label_column: Any
) -> tuple[str, list[Any]]:
    """What the rows hold, and the columns of images or texts."""
    if not isinstance(row, Mapping):
        if isinstance(row, (tuple, list)) and len(row) == 2:
            return ("images", [0]) if isinstance(row[0], Image) else ("tensors", [])
        raise EvaluationError(
            "a row must be a dictionary or a pair (pixels, label)",
            received=type(row).__name__,
            remedy="Use a data set of `datasets`, or torch's TensorDataset.",
        )
    for name in [image_column] if image_column else [*(text_columns or [])]:
        if name not in row:
            raise EvaluationError("a column that is named must exist", received=name, remedy=f"Of {', '.join(row)}.")
    if image_column is None and text_columns is None:
        for kind in ("pixel_values", "input_ids"):
            if kind in row:
                return kind, []
    images = [image_column] if image_column else [name for name, value in row.items() if isinstance(value, Image)]
    texts = list(text_columns or [n for n, value in row.items() if isinstance(value, str) and n != label_column])
    if len(images) == 1 and text_columns is None:
        return "images", images
    known = text_columns or len(texts) == 1 or tuple(texts) in PAIRS
    if 1 <= len(texts) <= 2 and known and (text_columns or not images):
        return "texts", texts
    raise EvaluationError(
        "rows must hold one image or one text, or the two texts of a known pair",
        received=f"columns of images: {', '.join(images) or 'none'}; of texts: {', '.join(texts) or 'none'}",
        remedy="Name them with image_column or text_columns.",
    )
