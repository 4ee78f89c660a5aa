"""Tiny models of each task with their processors and data, for `compress`."""

import numpy as np
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from transformers import ViTImageProcessorPil

from tests import models, text_models

NAMES = ["a", "b", "c", "d", "e"]
WORDS = ["good", "film", "bad", "plot", "the", "a", "was", "not"]


def image_processor():
    return ViTImageProcessorPil(size={"height": models.IMAGE, "width": models.IMAGE})


def vit(**overrides):
    """A classifier of five named classes."""
    return models.vit(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}, **overrides)


def pictures(rows=40, splits=("train", "validation", "test"), names=NAMES):
    """Noise, with labels in turn."""
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})

    def split():
        noise = rng.integers(0, 256, (rows, models.IMAGE, models.IMAGE, 3), dtype=np.uint8)
        images = [Picture.fromarray(x) for x in noise]
        return Dataset.from_dict({"image": images, "label": [i % len(names) for i in range(rows)]}, features=features)

    return DatasetDict({name: split() for name in splits})


def sentences(rng, rows, words):
    return [[WORDS[i] for i in rng.integers(0, len(WORDS), words)] for _ in range(rows)]


def texts(rows=40, classes=text_models.LABELS):
    """Columns sentence and label."""
    rng = np.random.default_rng(0)
    features = Features({"sentence": Value("string"), "label": ClassLabel(num_classes=classes)})

    def split():
        lines = [" ".join(line) for line in sentences(rng, rows, 4)]
        return Dataset.from_dict({"sentence": lines, "label": [i % classes for i in range(rows)]}, features=features)

    return DatasetDict({name: split() for name in ("train", "validation", "test")})


def tagged(rows=40):
    """Columns tokens and ner_tags, one tag a word."""
    rng = np.random.default_rng(0)
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))})

    def split():
        tags = rng.integers(0, len(NAMES), (rows, 4)).tolist()
        return Dataset.from_dict({"tokens": sentences(rng, rows, 4), "ner_tags": tags}, features=features)

    return DatasetDict({name: split() for name in ("train", "validation", "test")})


def tokenizer():
    """A token for each byte; its special tokens are those of the tiny models."""
    return text_models.byte_tokenizer(model_max_length=32, eos_token="[SEP]")


def case(task):
    """A model, data and a processor for a task."""
    words = {"vocab_size": 261, "max_position_embeddings": 32}
    if task == "image":
        return vit(), pictures(), image_processor()
    if task == "text":
        return text_models.classifier("Bert", vocab_size=261), texts(), tokenizer()
    if task == "token":
        names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
        return models.bert(transformers.BertForTokenClassification, **words, **names), tagged(), tokenizer()
    return models.llama(**words), texts().remove_columns("label"), tokenizer()
