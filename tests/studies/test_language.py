"""The study of language models on a tiny one: every row is made once; texts that the model writes itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as verbosity

from studies import adapters_language, language, language_texts
from tests.text_models import byte_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(eos_token="[SEP]")
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **SIZES)).save_pretrained(place)
    return place


def test_rows_are_made_once(folder, data_dir, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(language_texts, "LENGTH", 16)
    monkeypatch.setattr(language_texts, "docstrings", lambda *packages: [f"{p} makes arrays. " * 20 for p in packages])
    monkeypatch.setattr(language_texts, "licences", lambda: ["Permission is hereby granted to all. " * 20])
    options = ["--model_path", folder, "--output_dir", tmp_path, "--data_dir", data_dir, "--ratios", "0.4"]
    options += ["--calibration_blocks", "12", "--held_out_blocks", "3", "--batch_size", "2", "--written_blocks", "2"]
    monkeypatch.setattr("sys.argv", ["language", *map(str, options)])
    level = verbosity.get_verbosity()
    language.main()
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["label"] for row in record["rows"]][1:] == [f"40 % removed, {m}" for m in language.METHODS]
    assert set(record["rows"][0]["perplexity"]) == {"docstrings", "reviews", "licences", "source", "mean"}
    means = [row["perplexity"]["mean"] for row in record["rows"]]
    assert all(mean > 1 for mean in means) and len(set(means)) == len(means)  # every method makes another model
    with monkeypatch.context() as patched:
        patched.setattr(language.Study, "compressed", lambda *args: pytest.fail("made again"))
        language.main()
    assert capsys.readouterr().out == text

    options += ["--methods", "Fisher, κ ≤ 5", "--recovery_steps", "6", "--learning_rate", "1e-2"]
    monkeypatch.setattr("sys.argv", ["language", *map(str, options)])
    language.main()
    recovered = json.loads((tmp_path / "results.json").read_text())["rows"][1]
    assert recovered["perplexity"]["mean"] not in means and recovered["kappa"] <= 5 * (1 + 1e-4)
    verbosity.set_verbosity(level)
    verbosity.enable_progress_bar()


def test_a_model_writes_blocks_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(language_texts, "LENGTH", 16)
    monkeypatch.setattr(language_texts, "AT_A_TIME", 2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(200))  # texts end early, if they may
    blocks = language_texts.written_blocks(model, tokenizer, 5)
    assert blocks.shape == (5, 16) and (blocks[:, 1:] >= 200).all()
    assert len(set(blocks[:, 0].tolist())) > 1 and len(set(blocks[:, 1:].flatten().tolist())) > 10
    assert torch.equal(blocks, language_texts.written_blocks(model, tokenizer, 5))


def test_adapters_of_a_language_model(folder, data_dir, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        adapters_language, "docstrings", lambda *packages: [f"{p} makes arrays. " * 20 for p in packages]
    )
    monkeypatch.setattr(language_texts, "LENGTH", 16)
    options = ["--model_path", folder, "--output_dir", tmp_path, "--data_dir", data_dir, "--r", "2", "--steps", "4"]
    options += ["--batch_size", "2", "--held_out_blocks", "3", "--rows", "LoRA", "τ = 0.1"]
    monkeypatch.setattr("sys.argv", ["adapters", *map(str, options)])
    level = verbosity.get_verbosity()
    adapters_language.main()
    verbosity.set_verbosity(level)
    verbosity.enable_progress_bar()
    text, record = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert [row["label"] for row in record["rows"]] == ["LoRA", "τ = 0.1"] and "| not adapted |" in text
    chosen = record["rows"][1]
    assert chosen["validation_accuracy"] == max(r["validation_accuracy"] for r in record["sweep"] if r["tau"] == "0.1")
    assert max(chosen["kappa_of_updates"].values()) <= 1.1 * (1 + 1e-4)
    assert chosen["perplexity"] != record["dense"] and set(record["dense"]) == {"reviews", "docstrings"}
