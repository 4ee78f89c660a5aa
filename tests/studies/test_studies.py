"""Our own studies on tiny data: every row is made once, and a study of robustness finds the models of the others."""

import json
import re

import pytest
from transformers.utils import logging as verbosity

from hf_condlr.robustness.attacks import FGSM, PGD, Corruption
from studies import adapters, robustness_study, rows, text_study, vit_small
from studies.paper import table
from tests.text_models import BAD, FILLER, GOOD, bert_for, word_tokenizer


@pytest.fixture(autouse=True)
def as_it_was():
    """The studies silence transformers."""
    level = verbosity.get_verbosity()
    yield
    verbosity.set_verbosity(level)
    verbosity.enable_progress_bar()


@pytest.fixture
def run(monkeypatch, capsys, data_dir):
    monkeypatch.setenv("CONDLR_DATA", data_dir)

    def run(module, *options):
        """What a study prints."""
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, options)])
        module.main()
        return capsys.readouterr().out

    return run


def counted(monkeypatch, owner, name):
    """The calls of a function from now on."""
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    return calls


def test_vit_small_and_its_robustness(run, monkeypatch, tmp_path):
    monkeypatch.setattr(vit_small, "VALIDATION_IMAGES", 20)
    options = ["--output_dir", tmp_path / "vit_mnist", "--methods", "dense", "tau=0.1", "--seeds", "0", "1"]
    options += ["--epochs", "1", "--learning_rates", "1e-3", "1e-2"]
    trained = counted(monkeypatch, vit_small, "fit")
    text = run(vit_small, *options)
    assert len(trained) == 6  # two rates with the first seed, one with the second
    assert run(vit_small, *options) == text and len(trained) == 6
    path = tmp_path / "vit_mnist" / "results.json"
    record = json.loads(path.read_text())
    assert [row["label"] for row in record["rows"]] == 2 * ["dense", "CondLR τ = 0.1"]
    dense, factored = record["rows"][:2]
    assert factored["parameters"] < 0.6 * dense["parameters"]
    assert len(factored["condition_numbers"]) == len(dense["condition_numbers"]) == 24
    assert max(factored["condition_numbers"].values()) <= 1.1 * (1 + 1e-4)
    assert re.search(r"^\| CondLR τ = 0.1 \| .* \| 1.1 \| 2 \|$", text, re.MULTILINE)

    monkeypatch.setitem(robustness_study.BUDGETS, "vit", ((0.01, 0.1), (0.5,), 0.07))
    monkeypatch.setattr(robustness_study, "KINDS", ("contrast",))
    monkeypatch.setattr(robustness_study, "AutoAttack", lambda epsilon: PGD(epsilon, steps=1))  # the real one is slow
    options = ["--study", "vit", "--record", path, "--samples", "8", "--steps", "1", "--checked_seeds", "9"]
    options += ["--output_dir", tmp_path, "--autoattack_samples", "4"]
    attacked = counted(monkeypatch, rows, "evaluate_robustness")
    text = run(robustness_study, *options)
    assert len(attacked) == 4 + 2
    for line in ("worst linf 0.01", "area, linf", "pgd-l2 0.5", "contrast 3"):
        assert len(re.findall(rf"^\| {line} \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|$", text, re.MULTILINE)) == 1
    assert (tmp_path / "vit" / "curves.png").exists()
    assert run(robustness_study, *options) == text and len(attacked) == 6


def test_robustness_of_the_published_network(run, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "ATTACKS", (FGSM(0.05),))
    options = ["--methods", "tau=0.1", "svd_prune", "--rank_ratios", "0.2"]
    options += ["--learning_rates", "0.1", "--seeds", "0", "--epochs", "1", "--batch_size", "16", "--gamma", "1"]
    monkeypatch.setattr("sys.argv", ["table", *options, "--output_dir", str(tmp_path), "--check_samples", "0"])
    table.main(*table.parse(table.Options, table.TrainingOptions))
    part = robustness_study.Part([FGSM(0.1), FGSM(0.2), Corruption("contrast", 1)], rows_of_digits, 4)
    monkeypatch.setattr(robustness_study, "parts", lambda o: [part])
    options = ["--study", "lenet5", "--record", tmp_path / "results.json", "--output_dir", tmp_path]
    text = run(robustness_study, *options, "--check_samples", "2")
    assert "CondLR τ = 0.1, rank ratio 0.2" in text and "SVD prune, rank ratio 0.2" in text


def rows_of_digits():
    return robustness_study.load_images()["test"].first(4)


def test_text_study_and_its_robustness(run, monkeypatch, tmp_path):
    tokenizer = word_tokenizer(GOOD + BAD + FILLER)
    bert_for(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    names = ["dense", "compressed only, τ = 1", "τ = 1, distillation 0.9, adversarial 0.05"]
    names += ["before fine-tuning: unconstrained"]
    options = ["--model_path", tmp_path / "start", "--output_dir", tmp_path / "text", "--rows", *names, "--seeds", "0"]
    options += ["--steps", "3", "--dense_steps", "3", "--calibration_sentences", "32", "--attacked", "8"]
    options += ["--learning_rates", "1e-3"]
    text = run(text_study, *options)
    record = json.loads((tmp_path / "text" / "results.json").read_text())
    assert [row["label"] for row in record["rows"]] == names
    only, trained = record["rows"][1:3]
    assert only["learning_rate"] == 0 and max(only["condition_numbers"].values()) <= 2 * (1 + 1e-4)
    assert max(trained["condition_numbers"].values()) <= 2 * (1 + 1e-4)
    assert set(trained["robust_accuracy"]) >= {"pgd-embedding 0.02", "pgd-embedding 0.05", "characters 0.1"}
    assert (tmp_path / "text" / "study.png").exists() and "worst case of embedding attacks" in text
    again = counted(monkeypatch, text_study.Experiment, "_train")
    assert run(text_study, *options) == text and not again

    options = ["--study", "minilm", "--record", tmp_path / "text" / "results.json", "--samples", "8", "--steps", "1"]
    text = run(robustness_study, *options, "--output_dir", tmp_path, "--checked_seeds", "9")
    assert "| pgd-embedding 0.02 |" in text and "| characters 0.1 |" in text


def test_sweep_chooses_the_smaller_of_two_equal_rates_and_leaves_out_what_diverged():
    def train(variant, rate, seed):
        row = {"label": variant, "learning_rate": rate, "seed": seed, "validation_accuracy": min(rate, 2)}
        return row | {"diverged": rate == 4 or variant == "never"}

    results = rows.sweep(["a", "never"], [4, 3, 2, 1], [7, 8], train=train, test=lambda *job: {"tested": job})
    assert results["chosen"] == [{"label": "a", "learning_rate": 2}, {"label": "never", "learning_rate": None}]
    assert [row["tested"] for row in results["rows"]] == [("a", 2, 7), ("a", 2, 8)]
    assert len(results["sweep"]) == 8


def test_adapters_of_an_encoder(run, monkeypatch, tmp_path):
    tokenizer = word_tokenizer(GOOD + BAD + FILLER)
    bert_for(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    options = ["--model_path", tmp_path / "start", "--output_dir", tmp_path / "text_study", "--r", "2", "--steps", "3"]
    options += ["--rows", "LoRA", "τ = 0.1", "τ = 0.1 from the gradient", "--seeds", "0", "1", "--attacked", "8"]
    options += ["--learning_rates", "1e-3", "1e-2"]
    text = run(adapters, *options)
    record = json.loads((tmp_path / "adapters" / "results.json").read_text())
    assert [row["label"] for row in record["rows"]] == 2 * ["LoRA", "τ = 0.1", "τ = 0.1 from the gradient"]
    assert all(
        max(row["kappa_of_updates"].values()) <= 1.1 * (1 + 1e-4) for row in record["rows"] if row["tau"] == "0.1"
    )
    assert len(record["sweep"]) == 6 and "median κ(ΔW)" in text and "worst case of embedding attacks" in text
    again = counted(monkeypatch, adapters.AdapterExperiment, "_adapter_trainer")
    assert run(adapters, *options) == text and not again
