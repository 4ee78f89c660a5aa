"""Texts, images and data sets as calibration data, by a tokenizer or processor."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_condlr import Calibration, CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.texts import as_batches
from hf_condlr.errors import ConfigError, ConversionError
from tests.models import bert, vit

WORDS = ["a", "short", "text", "and", "another", "longer", "one"]
TEXTS = ["a short text", "and another longer text", " ", "one"] * 3


def tokenizer(**tokens):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[EOS]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **tokens)


@pytest.mark.parametrize("tokens", [{"pad_token": "[PAD]"}, {"eos_token": "[EOS]"}], ids=["pad", "only eos"])
@pytest.mark.parametrize(
    "data", [TEXTS, Dataset.from_dict({"text": TEXTS, "label": [0] * 12})], ids=["list", "Dataset"]
)
def test_texts_become_padded_batches_of_eight(data, tokens):
    processing_class = tokenizer(**tokens)
    first, second = as_batches(data, processing_class)
    assert first["input_ids"].shape == (8, 4) and second["input_ids"].shape == (1, 1)  # blank texts are left out
    assert first["attention_mask"].sum(1).tolist() == [3, 4, 1, 3, 4, 1, 3, 4]
    assert processing_class.pad_token == tokens.get("pad_token")


def test_long_texts_are_cut():
    limited = tokenizer(pad_token="[PAD]", model_max_length=5)
    for processing_class, length in ((tokenizer(pad_token="[PAD]"), 512), (limited, 5)):
        (batch,) = as_batches(["a " * 1000], processing_class)
        assert batch["input_ids"].shape == (1, length)


def test_rows_with_the_models_inputs_are_collated_as_trainer_does():
    rows = Dataset.from_dict({"input_ids": [[3, 4], [5]], "label": [1, 0], "text": ["a short", "text"]})
    (batch,) = as_batches(rows, tokenizer(pad_token="[PAD]"))
    assert batch["input_ids"].tolist() == [[3, 4], [5, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]] and batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("rows", [False, True])
def test_images_are_processed(rows):
    images = [Image.new("L", (20, 10), color=i) for i in range(9)]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    batches = as_batches([{"image": x, "label": 0} for x in images] if rows else images, processor)
    assert [batch["pixel_values"].shape for batch in batches] == [(8, 3, 8, 8), (1, 3, 8, 8)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_converted_from_texts(wrapped):
    config, words = CondLRConfig(r=2, init_weights="activation_aware"), tokenizer(pad_token="[PAD]")
    model = bert()
    if wrapped:
        get_robust_lowrank_model(model, config, calibration_data=Calibration(TEXTS, processing_class=words))
    else:
        get_robust_lowrank_model(model, config, calibration_data=TEXTS, processing_class=words)
    assert all(layer.whitened_truncation_error < 1 for layer in model.condlr.report.converted.values())


def test_texts_without_a_tokenizer_are_an_error_that_names_it():
    config = CondLRConfig(r=2, init_weights="activation_aware")
    with pytest.raises(ConversionError, match=r"received a str\. Pass .* processing_class with texts"):
        get_robust_lowrank_model(bert(), config, calibration_data=TEXTS)


@pytest.mark.parametrize(
    ("data", "received"),
    [
        ([torch.ones(2, 3)], "Tensor"),
        ([3], "int"),
        ([{"question": "a", "answer": "text"}], "rows with question: str, answer: str"),
        ([{"label": 3}], "rows with label: int"),
        (["a", None], "str"),
    ],
)
def test_what_is_not_processed_is_refused(data, received):
    with pytest.raises(ConversionError, match=f"must hold texts, images, or rows with one column.*received {received}"):
        as_batches(data, tokenizer(pad_token="[PAD]"))


@pytest.mark.parametrize("data", [None, Calibration([])])
def test_a_processing_class_without_data_of_its_own_is_refused(data):
    config = CondLRConfig(r=2, init_weights="svd" if data is None else "activation_aware")
    with pytest.raises(ConfigError, match="processing_class makes batches of calibration_data"):
        get_robust_lowrank_model(vit(), config, calibration_data=data, processing_class=tokenizer())
