"""`Samples`: images, pixels and texts of every form give the same numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr.errors import AttackError, EvaluationError
from hf_condlr.robustness.attacks import EmbeddingPGD
from tests import classifiers, text_models
from tests.robustness.evaluation.evaluation import ATTACKS, TEXT_ATTACKS, evaluate, reviews


def test_images_pixel_values_and_pairs_give_the_same():
    processor, model = classifiers.processor(), classifiers.mlp()
    images = classifiers.images(60)

    def transform(batch):
        values = processor([image.convert("L") for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "labels": batch["label"]}

    results = [
        evaluate(model, dataset, processor=processor)
        for dataset in (images, images.with_transform(transform), classifiers.Pairs(60))
    ]
    kinds = [report.settings["data"] for report in results]
    assert kinds == ["images", "pixel_values", "tensors"]
    for report in results[1:]:
        assert report.correct == results[0].correct
        for a, b in zip(report.attacks, results[0].attacks, strict=True):
            assert np.mean(np.array(a.survived) != np.array(b.survived)) <= 0.02  # measured: 0
    assert results[0].model.startswith("digits-mlp@")


class Wrapper(nn.Module):
    """Passes all arguments on, as PEFT and torch.compile do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_other_forms_of_the_same_data_and_model():
    images, processor = classifiers.images(40), classifiers.processor()
    expected = evaluate(classifiers.mlp(), images, processor=processor)
    rows = [(row["image"], row["label"]) for row in images]
    values = [{"pixel_values": (x - classifiers.MEAN) / classifiers.STD, "labels": y} for x, y in classifiers.Pairs(40)]
    for model, dataset in (
        (classifiers.mlp(), rows),  # pictures and labels, as torchvision's data sets give them
        (classifiers.mlp(), images.with_format("torch")),
        (Wrapper(classifiers.mlp()), values),
        (Wrapper(classifiers.mlp()), images),
    ):
        report = evaluate(model, dataset, processor=processor, checks="quick", check_samples=8)
        assert [a.survived for a in report.attacks] == [a.survived for a in expected.attacks]
        [own] = [check for check in report.checks if check.name == "the attacked model is the model"]
        assert own.passed and "own preprocessing" in own.found
    single = evaluate(classifiers.mlp(), images, ATTACKS[1], processor=processor)
    assert single.attacks[0].survived == expected.attacks[1].survived
    model = classifiers.mlp()
    with torch.inference_mode():
        again = evaluate(model, images, processor=processor)
    assert [a.survived for a in again.attacks] == [a.survived for a in expected.attacks]


def test_processors_of_several_kinds_and_those_that_normalise_otherwise():
    images, processor = classifiers.images(40), classifiers.processor()
    expected = evaluate(classifiers.mlp(), images, processor=processor)
    both = type("BothProcessor", (), {"image_processor": processor, "tokenizer": object()})()
    report = evaluate(classifiers.mlp(), images, processor=both)
    assert [a.survived for a in report.attacks] == [a.survived for a in expected.attacks]
    assert report.settings["columns"] == ["image", "label"] and report.settings["processor"] == type(processor).__name__
    with pytest.raises(AttackError, match="must say how pixels are normalised; received object"):
        evaluate(classifiers.mlp(), classifiers.Pairs(4), processor=object())
    processor.include_top = True
    with pytest.raises(AttackError, match=r"must normalise pixels once; received .*include_top=True"):
        evaluate(classifiers.mlp(), images, processor=processor)


def test_images_without_their_normalisation_are_refused():
    with pytest.raises(EvaluationError, match="their normalisation must be known; received images and no image proc"):
        evaluate(classifiers.mlp(), classifiers.images(4))
    with pytest.raises(EvaluationError, match="images must be made into pixels by the model's image processor"):
        evaluate(classifiers.pixel_mlp(), classifiers.images(4))


def test_texts_pairs_and_tokens_are_evaluated():
    model, tokenizer = text_models.trained_reviewer()
    data = reviews()
    report = evaluate(model, data, TEXT_ATTACKS, processor=tokenizer)
    assert report.settings["data"] == "texts" and report.clean_accuracy > 0.9
    assert 0.05 < report.attacks[0].robust_accuracy < report.clean_accuracy
    assert report.attacks[2].robust_accuracy < report.clean_accuracy
    assert report.attacks[0].largest_distance <= 0.3 * (1 + 1e-5)
    tokens = data.map(lambda batch: tokenizer(batch["text"]), batched=True)  # the text column stays, unused
    both = type("BothProcessor", (), {"image_processor": object(), "tokenizer": tokenizer})()  # it pads them
    of_tokens = evaluate(model, tokens, TEXT_ATTACKS[:2], processor=both)
    assert of_tokens.settings["data"] == "input_ids"
    for ours, theirs in zip(of_tokens.attacks, report.attacks, strict=False):
        assert ours.survived == theirs.survived
    pairs = data.add_column("text_pair", ["the plot was"] * len(data))
    paired = evaluate(model, pairs, [EmbeddingPGD(0.3, steps=2)], processor=tokenizer)
    assert paired.samples == 48 and paired.settings["data"] == "texts"
    named = data.add_column("id", [f"review {i}" for i in range(len(data))])
    with pytest.raises(EvaluationError, match=r"or the two texts of a known pair.*of texts: text, id.*text_columns"):
        evaluate(model, named, TEXT_ATTACKS[:1], processor=tokenizer)
    alone = evaluate(model, pairs, TEXT_ATTACKS[:1], processor=tokenizer, text_columns=["text"])
    assert alone.attacks[0].survived == report.attacks[0].survived


def test_texts_without_their_tokenizer_and_tokens_for_the_character_attack_are_refused():
    model, tokenizer = text_models.trained_reviewer()
    with pytest.raises(AttackError, match="texts need a tokenizer"):
        evaluate(model, reviews(4), TEXT_ATTACKS[:1])
    tokens = reviews(4).map(lambda batch: tokenizer(batch["text"]), batched=True)
    with pytest.raises(EvaluationError, match="must take what the data set holds, input ids; received characters"):
        evaluate(model, tokens, TEXT_ATTACKS, processor=tokenizer)


def test_what_a_test_does_to_a_cached_model_or_digit_no_other_test_sees():
    model, pixels = text_models.classifier("Bert"), classifiers.held_out(4)[0]
    before = pixels.clone()
    pixels.zero_()
    next(model.parameters()).data.zero_()
    model.forward = None
    assert torch.equal(classifiers.held_out(4)[0], before)
    again = text_models.classifier("Bert")
    assert next(again.parameters()).any() and callable(again.forward)
