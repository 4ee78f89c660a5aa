"""The study of pretrained models on tiny ones: rows, resuming, the baseline FWSVD, crops."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import Dinov2Config, Dinov2ForImageClassification
from transformers.utils import logging as verbosity

import studies.pretrained.__main__ as study
from hf_condlr import condition_report
from hf_condlr.robustness.attacks import EmbeddingPGD, TextModel
from studies.pretrained import dense, experiment, methods, picture, report
from studies.pretrained.fwsvd import input_information, weighted_factors
from studies.pretrained.tasks import PIXELS, load_task, random_crop
from tests.models import bert, tokens
from tests.studies.conftest import pictures
from tests.text_models import BAD, FILLER, GOOD, bert_for, reviews, word_tokenizer


@pytest.fixture(autouse=True)
def as_it_was():
    """The studies silence transformers."""
    level = verbosity.get_verbosity()
    yield
    verbosity.set_verbosity(level)
    verbosity.enable_progress_bar()


def called(monkeypatch, capsys, program, options):
    words = [word for name, value in options.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]
    monkeypatch.setattr("sys.argv", ["study", *words])
    program.main()
    return capsys.readouterr().out


@pytest.fixture
def sentences(tmp_path):
    """The options of a tiny text encoder and its data."""
    (tmp_path / "data").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        rows, labels = reviews(64, seed)
        data = Dataset.from_dict({"sentence": rows, "label": labels})
        data.cast_column("label", ClassLabel(num_classes=2)).to_parquet(tmp_path / "data" / f"{split}.parquet")
    tokenizer = word_tokenizer(GOOD + BAD + FILLER)
    bert_for(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return {"task": "sst2", "model_path": tmp_path / "start", "data": tmp_path / "data"}


def test_a_table_of_sentences(monkeypatch, capsys, tmp_path, sentences):
    tuned = sentences | {"output_dir": tmp_path / "tuned", "steps": 4, "sweep_steps": 2, "threads": 1}
    called(monkeypatch, capsys, dense, tuned | {"learning_rates": [1e-3, 2e-3], "head_samples": 32})
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    best = max(record["sweep"], key=lambda row: row["validation_accuracy"])
    assert record["final"]["learning_rate"] == best["learning_rate"] and not list(tmp_path.glob("**/checkpoint-*"))

    options = sentences | {"model_path": tmp_path / "tuned", "output_dir": tmp_path / "out", "calibration": 32}
    options |= {"clean": 32, "attacked": 8, "attack_steps": 2, "check": "ours-1", "bf16": False}
    text = called(monkeypatch, capsys, study, options)
    rows = json.loads((tmp_path / "out" / "results-0.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(methods.COMPARED)
    kappa = {row["method"]: max(row["condition_numbers"].values()) for row in rows}
    for method, bound in {"ours-4": 5, "ours-1": 2, "ours-0.1": 1.1}.items():
        assert kappa[method] <= bound * (1 + 1e-4)
    assert kappa["ours"] > 1.5
    sizes = {row["method"]: row["parameters"] for row in rows}
    assert sizes["svd"] == sizes["fwsvd"] == sizes["activation-aware"] < sizes["dense"]
    assert all(len(row["right"]) == 32 and len(row["survived"]["embedding 0.05"]) == 8 for row in rows)
    assert all(row["milliseconds"] > 0 for row in rows)
    assert "| Fisher, κ ≤ 1.1 | 60 % |" in text and (tmp_path / "out" / "results-0.png").exists()

    options |= {"methods": ["svd", "ours-1"], "recovery_steps": 3, "learning_rates": [1e-3, 1e-2], "seeds": [0, 1]}
    text = called(monkeypatch, capsys, study, options)
    record = json.loads((tmp_path / "out" / "results-3.json").read_text())
    assert len(record["sweep"]) == len(record["rows"]) == 4
    assert all(max(row["condition_numbers"].values()) <= 2.001 for row in record["rows"] if row["method"] == "ours-1")
    options |= {"methods": ["dense", "ours-1"], "adversarial": 0.05, "learning_rates": [1e-3], "seeds": [0]}
    options |= {"epsilons": ["0.01", "1/20"], "queries": 3}
    text = called(monkeypatch, capsys, study, options)
    assert "| dense, trained further, adversarially | — |" in text
    plain, adversarial = record, json.loads((tmp_path / "out" / "results-3-0.05.json").read_text())
    assert {row["training_loss"] for row in plain["rows"]}.isdisjoint(
        row["training_loss"] for row in adversarial["rows"]
    )
    for row in adversarial["rows"]:
        assert row["validation_accuracy"] == (row["validation_clean"] + row["validation_robust"]) / 2
        assert set(row["survived"]) == {"embedding 0.01", "embedding 0.05"}
    losses = {adversarial["rows"][0]["training_loss"]}
    for attack in ("pgd", "trades"):
        options["attack"] = attack
        text = called(monkeypatch, capsys, study, options)
        assert f"| dense, trained further, by {attack.upper()} | — |" in text
        record = json.loads((tmp_path / "out" / f"results-3-0.05-{attack}.json").read_text())
        losses.add(record["rows"][0]["training_loss"])
    assert len(losses) == 3
    records = sorted((tmp_path / "out").glob("results-*.json"))
    sizes = []
    for names in ({}, {"names": ["plain", "b", "c", "d", "robust"]}):
        called(monkeypatch, capsys, picture, {"records": records, "output": tmp_path / "picture.png", **names})
        sizes.append((tmp_path / "picture.png").stat().st_size)
    assert len(records) == 5 and sizes[0] != sizes[1]  # the names are drawn
    with pytest.raises(ValueError, match="one for each record; received 1 for 2"):
        picture.Options(["a.json", "b.json"], "picture.png", names=["a"])
    again = []
    monkeypatch.setattr(experiment, "compressed", again.append)
    monkeypatch.setattr(experiment, "fitted", again.append)
    assert called(monkeypatch, capsys, study, options) == text and not again


def test_candidates_for_robustness_differ_where_they_should(sentences, tmp_path):
    task = load_task("sst2", sentences["data"], sentences["model_path"])
    samples = experiment.Samples(calibration=64)
    made = experiment.Experiment(task, sentences["model_path"], tmp_path / "rows", samples, bf16=False)

    def kappa(method):
        return made.start(experiment.Variant(method, 0.3))["condition_numbers"]

    plain = kappa("ours-4-sequential")
    assert max(plain.values()) > 2.01
    for method, part in {
        "ours-4-sequential-qk": r"query|key",
        "ours-4-sequential-mlp": r"\d\.(intermediate|output)",
    }.items():
        found = kappa(method)
        bounded = {name for name in found if re.search(part, name)}
        assert bounded and max(found[name] for name in bounded) <= 2.001 < max(found.values())
    assert kappa("ours-4-sequential-attacked") != plain


def test_an_attacked_batch_is_what_the_attack_found(sentences):
    task = load_task("sst2", sentences["data"], sentences["model_path"])
    model, attack = task.model(sentences["model_path"]).eval(), EmbeddingPGD(0.5, steps=2)
    batch = task.collate([task.train[i] for i in range(4)])
    texts = TextModel(model, task.processor)
    tokens = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = texts(attack(texts, tokens, batch["labels"]))
        torch.testing.assert_close(model(**task.attacked(model, attack, batch)).logits, expected)
        assert not torch.allclose(texts(tokens), expected)


def test_capped_is_the_nearest_with_bounded_singular_values():
    S = torch.tensor(np.random.default_rng(0).normal(size=(6, 6)))
    sigma = np.linalg.svd(S, compute_uv=False)
    limit = 1.2 * np.sqrt((sigma**2).mean())
    T = methods.capped(S, 1.2)
    np.testing.assert_allclose(np.linalg.svd(T, compute_uv=False), np.minimum(sigma, limit), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(S - T), np.linalg.norm(np.maximum(sigma - limit, 0)), atol=1e-12)
    np.testing.assert_allclose(methods.capped(S, 3.0), S, atol=1e-12)


def test_photographs(tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = Dinov2ForImageClassification(Dinov2Config(**config, mlp_ratio=2, num_labels=4))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for seed, (split, count) in enumerate({"train": 440, "test": 12}.items()):
        pictures((40, 40, 3), count, 4, seed).to_parquet(tmp_path / "data" / f"{split}.parquet")
    task = load_task("imagenette", tmp_path / "data", tmp_path / "model")
    samples = experiment.Samples(calibration=8, clean=6, attacked=4, attack_steps=1)
    done = experiment.Experiment(task, tmp_path / "model", tmp_path / "rows", samples, bf16=False)
    variant = experiment.Variant("ours-4", 0.5, steps=1)
    row = done.test(variant, 1e-4, 0)
    assert set(row["survived"]) == {"linf 0.00196078", "linf 0.00392157", *experiment.CORRUPTIONS}
    model = task.model(done.train(variant, 1e-4, 0)["folder"])
    assert condition_report(model).max_condition_number <= 5 * (1 + 1e-4)
    assert len(task.validation) == 400 and task.augment([task.train[0]])["pixel_values"].shape == (1, 3, PIXELS, PIXELS)


def test_a_crop_is_a_part_of_the_picture():
    ramp = torch.arange(160, dtype=torch.uint8).expand(3, 160, 160)  # each column has its own grey
    torch.manual_seed(0)
    for _ in range(20):
        crop = random_crop(ramp, 0.35) * 255
        assert crop.shape == (3, PIXELS, PIXELS) and crop.min() >= 0 and crop.max() < 159.01
        steps = crop[0, 0].diff()  # a share of √0.35 to 1 of the width on 112 pixels, mirrored or not
        assert (steps > 0).all() or (steps < 0).all()
        assert 0.4 < steps[10:-10].abs().mean() < 1.5


def test_a_paired_difference_and_its_standard_error():
    # Seeds right on 1100 and 1010, dense on 1001: means 1, ½, ½, 0, differences 0, ½, ½, −1.
    values = np.array([0, 0.5, 0.5, -1])
    expected = f"{100 * values.mean():+.1f} ± {100 * values.std(ddof=1) / 2:.1f}"
    assert report.difference(["1100", "1010"], "1001") == expected == "+0.0 ± 35.4"


def test_fwsvd_minimises_the_weighted_error():
    rng = np.random.default_rng(0)
    W, d, r = rng.normal(size=(5, 7)), rng.uniform(0.1, 4, 7), 3
    U, S, V = weighted_factors(torch.tensor(W), torch.tensor(d), r)
    for X in (U, V):
        np.testing.assert_allclose(X.mT @ X, np.eye(r), atol=1e-12)
    sigma = np.linalg.svd(W * np.sqrt(d), compute_uv=False)
    error = (W - (U @ S @ V.mT).numpy()) * np.sqrt(d)
    np.testing.assert_allclose(np.linalg.norm(error), np.linalg.norm(sigma[r:]), rtol=1e-10)


def test_information_is_the_mean_squared_gradient_of_the_inputs_weights():
    model = bert()
    batches = [{**tokens(1), "labels": torch.tensor([label])} for label in (0, 1)]
    name = "bert.encoder.layer.0.intermediate.dense"
    found = input_information(model, [name], batches)[name]
    expected = torch.zeros_like(found)
    for batch in batches:
        model.eval().zero_grad()
        model(**batch).loss.backward()
        expected += model.get_submodule(name).weight.grad.square().sum(0) / 2
    torch.testing.assert_close(found, expected)
