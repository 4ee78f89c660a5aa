"""Adversarial examples in files."""

import torch
from datasets import load_dataset

from hf_condlr.robustness.attacks import FGSM, PGD, TextModel
from tests import classifiers, text_models
from tests.robustness.evaluation.evaluation import TEXT_ATTACKS, evaluate, reviews


def test_saved_examples_are_those_that_were_evaluated(tmp_path):
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    report = evaluate(model, attacks=[PGD(0.1, steps=5), FGSM(0.05)], output_dir=tmp_path, save_examples=True)
    for result, name in zip(report.attacks, ("pgd-linf-0.1", "fgsm-0.05"), strict=True):
        folder = tmp_path / f"examples-{report.settings['key']}" / name
        rows = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"].with_format("torch")
        assert len(rows) == sum(report.correct)
        index, adversarial = rows["index"][:], torch.stack(list(rows["pixels"][:]))
        assert adversarial.shape[1:] == (1, 8, 8) and adversarial.dtype == torch.float32
        assert torch.equal(rows["label"][:], labels[index])
        assert (adversarial - pixels[index]).abs().max() <= result.epsilon + 1e-6
        predictions = model(adversarial).argmax(1)
        assert torch.equal(predictions, rows["prediction"][:])
        assert (predictions == labels[index]).tolist() == [result.survived[i] for i in index.tolist()]


def test_examples_of_texts_are_saved(tmp_path):
    model, tokenizer = text_models.trained_reviewer()
    report = evaluate(model, reviews(), TEXT_ATTACKS, processor=tokenizer, output_dir=tmp_path, save_examples=True)
    cache = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    folder = tmp_path / f"examples-{report.settings['key']}"
    rows = load_dataset(str(folder / "characters-0.3"), **cache)
    inputs = tokenizer(rows["text"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.argmax(1).tolist() == rows["prediction"][:]
    rows = load_dataset(str(folder / "pgd-embedding-0.3"), **cache).with_format("torch")
    batch = {name: torch.stack(list(rows[name][:])) for name in ("input_ids", "attention_mask", "perturbation")}
    with torch.no_grad():
        predictions = TextModel(model, tokenizer)(batch).argmax(1)
    assert torch.equal(predictions, rows["prediction"][:])
    survived = [report.attacks[0].survived[i] for i in rows["index"][:].tolist()]
    assert survived == (predictions == rows["label"][:]).tolist()
