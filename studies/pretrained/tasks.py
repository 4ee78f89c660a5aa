"""The tasks of the study: Imagenette's photographs for an image encoder, SST-2's sentences for a text encoder."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitImageProcessorPil,
    DataCollatorWithPadding,
)

from hf_condlr.robustness.attacks import Attack, PixelModel, TextModel

PIXELS = 112  # a multiple of DINOv2's 14-pixel patches
MAX_LENGTH = 64  # tokens of a sentence; the rest is cut off
ENCODER = r".*encoder\.layer\..*"


@dataclass
class Task:
    """A data set, and how a model takes it.

    Attributes:
        name: `imagenette` or `sst2`.
        processor: The image processor or tokenizer, which is saved with the models.
        train, validation, test: Rows with labels.
        augment: Joins rows of `train` to a batch, with random crops and flips for images.
        collate: Joins rows to a batch as the evaluation does.
        auto_class: Of transformers, which loads the model.
    """

    name: str
    processor: Any
    train: Any
    validation: Any
    test: Any
    augment: Callable[[list[Any]], dict[str, Tensor]]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    auto_class: Any

    def model(self, path: str | Path) -> Any:
        """The model in `path`; one without a classifier gets a fresh one, with the classes of the data."""
        names = self.test.features["label"].names
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return self.auto_class.from_pretrained(path, num_labels=len(names), **labels)

    def attackable(self, rows: Any) -> Any:
        """Rows as `evaluate_robustness` takes them: images or sentences, and labels."""
        if self.name == "imagenette":
            return rows.select_columns(["image", "label"]).cast_column("image", datasets.Image())
        return rows.select_columns(["sentence", "label"])

    def attacked(self, model: Any, attack: Attack, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `collate` as an attack on the model leaves it; a text as embeddings in place of its tokens."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.name == "imagenette":
            pixels = PixelModel.from_processor(model, self.processor)
            found = attack(pixels, pixels.denormalize(inputs["pixel_values"]), batch["labels"])
            return {"pixel_values": pixels.normalize(found).detach(), "labels": batch["labels"]}
        texts = TextModel(model, self.processor)
        tokens = attack(texts, inputs, batch["labels"])
        embedded = texts.embed({"input_ids": tokens.pop("input_ids")}) + tokens.pop("perturbation")
        return {"inputs_embeds": embedded.detach(), **tokens, "labels": batch["labels"]}


def load_task(name: str, data: str | Path, model_path: str | Path, *, least_area: float = 0.5) -> Task:
    """The task of the data in the folder `data` (`train.parquet` and so on) for the model in `model_path`.

    Training images are crops of at least the share `least_area` of the picture.
    """
    splits = datasets.load_dataset(str(data))
    if name == "imagenette":
        return _images(splits, least_area)
    return _texts(splits, AutoTokenizer.from_pretrained(model_path))


def _images(splits: Any, least_area: float) -> Task:
    splits = splits.cast_column("image", datasets.Image(decode=False))
    # Parts drawn once; the test split's order has the classes one after another.
    held_out = splits["train"].train_test_split(400, seed=0, stratify_by_column="label")
    size = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = BitImageProcessorPil(**size, image_mean=mean, image_std=std)

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        pixels = processor([decoded(row) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    def augment(rows: list[Any]) -> dict[str, Tensor]:
        pictures = [torch.from_numpy(np.array(decoded(row))).movedim(2, 0) for row in rows]
        pixels = torch.stack([random_crop(picture, least_area) for picture in pictures])
        normal = (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
        return {"pixel_values": normal, "labels": torch.tensor([row["label"] for row in rows])}

    return Task(
        "imagenette",
        processor,
        held_out["train"],
        held_out["test"],
        splits["test"],
        augment,
        collate,
        AutoModelForImageClassification,
    )


def decoded(row: dict[str, Any]) -> Image.Image:
    """The picture of a row, whose `image` holds the bytes of a file."""
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def random_crop(picture: Tensor, least_area: float) -> Tensor:  # (3, H, W) uint8 -> (3, PIXELS, PIXELS) in [0, 1]
    """A crop of at least this share of the area, with sides of 3:4 to 4:3, resized, and mirrored half of the time."""
    height, width = picture.shape[1:]
    area = height * width * torch.empty(()).uniform_(least_area, 1.0).item()
    ratio = math.exp(torch.empty(()).uniform_(-math.log(4 / 3), math.log(4 / 3)).item())
    h, w = min(height, round(math.sqrt(area * ratio))), min(width, round(math.sqrt(area / ratio)))
    top, left = (int(torch.randint(0, free + 1, ())) for free in (height - h, width - w))
    crop = picture[None, :, top : top + h, left : left + w].float() / 255
    crop = F.interpolate(crop, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if torch.rand(()) < 0.5 else crop


def _texts(splits: Any, tokenizer: Any) -> Task:
    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(batch["sentence"], truncation=True, max_length=MAX_LENGTH)

    splits = splits.map(tokenize, batched=True)
    for split in ("validation", "test"):  # similar lengths side by side: less padding
        lengths = [len(ids) for ids in splits[split]["input_ids"]]
        splits[split] = splits[split].select(np.argsort(lengths, kind="stable"))
    pad = DataCollatorWithPadding(tokenizer)
    names: Sequence[str] = [*tokenizer.model_input_names, "label"]

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return dict(pad([{name: row[name] for name in names if name in row} for row in rows]))

    return Task(
        "sst2",
        tokenizer,
        splits["train"],
        splits["validation"],
        splits["test"],
        collate,
        collate,
        AutoModelForSequenceClassification,
    )
