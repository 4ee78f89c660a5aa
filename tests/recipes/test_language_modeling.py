"""`recipes/language_modeling.py` as a user runs it: perplexities, blocks, tied embeddings, a sample, restarts."""

import math
import shutil

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_condlr import LowRankLinear
from tests.recipes.recipe_runs import ANY, load, read, train, words
from tests.recipes.test_text_classification import byte_backend
from tests.text_models import reviews

GPT2 = "{n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32}"
LLAMA = (
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 48, "
    "max_position_embeddings: 32}"
)
FRESH = ANY | {"model_type": "gpt2", "config_overrides": [GPT2], "vocabulary_size": 300, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, size) in enumerate({"train": 60, "validation": 20, "test": 20}.items()):
        Dataset.from_dict({"text": ["", *reviews(size, seed)[0]]}).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def call(corpus, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    return lambda **options: train(tmp_path / "out", "language_modeling", FRESH, **{"dataset_name": corpus} | options)


def perplexity(folder, texts, block_size=32):
    """By the definition, of the model as it loads back."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) - len(ids) % block_size]).reshape(-1, block_size)
    with torch.no_grad():
        scores = model(blocks).logits[:, :-1].log_softmax(-1).gather(-1, blocks[:, 1:, None])
    return model, math.exp(-scores.mean())


@pytest.mark.parametrize(
    ("model", "config", "method"),
    [("gpt2", GPT2, "condlr"), ("llama", LLAMA, "lowrank"), ("gpt2", GPT2, "dense")],
)
def test_perplexity_is_that_of_the_model_as_it_loads_back(call, corpus, capsys, model, config, method):
    fewer = {"max_eval_samples": None, "per_device_eval_batch_size": 3}  # 12 or so blocks: the last batch is not full
    out = call(model_type=model, config_overrides=[config], method=method, **fewer)
    metrics = read(out / "all_results.json")
    texts = [text for text in Dataset.from_parquet(str(corpus / "test.parquet"))["text"] if text]
    loaded, expected = perplexity(out, texts)
    assert metrics["test_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert metrics["test_perplexity"] < metrics["start_perplexity"]
    assert metrics["test_tokens"] == 32 * metrics["test_samples"]
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules()) == (method != "dense")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (model == "gpt2")  # tied, or not
    prompt = " ".join(texts[0].split()[:8])
    assert (out / "sample.txt").read_text().startswith(prompt)
    assert f"sample: {prompt}" in capsys.readouterr().out
    assert (out / "README.md").is_file() and (out / "condition_report.json").is_file() == (method != "dense")


def test_a_sample_goes_on_from_the_end_of_a_long_prompt_or_is_not_drawn(call):
    options = {"num_train_epochs": 0, "prompt": ["good film " * 9 + "was"]}  # more than the model's 32 positions
    out = call(**options, max_new_tokens=0)
    assert not (out / "sample.txt").exists()
    assert "was" in (call(**options) / "sample.txt").read_text()


def test_the_sample_is_drawn_when_the_model_is_safe_and_may_change_on_a_restart(call, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(load("language_modeling"), "generate", interrupted)
    options = {"max_steps": 1, "max_train_samples": 16, "save_strategy": "steps"}
    with pytest.raises(KeyboardInterrupt):
        call(**options)
    assert (tmp_path / "out" / "condlr.safetensors").is_file()
    monkeypatch.undo()
    assert (call(**options, prompt="film", max_new_tokens=4) / "sample.txt").read_text().startswith("film")


def test_an_interrupted_training_ends_as_an_uninterrupted_one(call, tmp_path, caplog):
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 2}  # GPT-2 has dropout
    whole = call(**options).rename(tmp_path / "whole")
    first = min(whole.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (tmp_path / "out").mkdir()
    shutil.copytree(first, tmp_path / "out" / first.name)
    for name in ("settings.json", "all_results.json"):
        shutil.copy(whole / name, tmp_path / "out")
    out = call(**options)
    assert f"going on from {out / first.name}" in caplog.text
    names = ("start_perplexity", "eval_perplexity", "test_perplexity", "test_kappa_max")
    before, after = (read(folder / "all_results.json") for folder in (whole, out))
    assert [after[name] for name in names] == pytest.approx([before[name] for name in names], rel=1e-6)
    table = load("results_table").table([whole, out])
    assert "| run | method | learning rate | start_perplexity | test_compression |" in table
    assert f"| {out} | condlr | 0.003 | {before['start_perplexity']:.4g} |" in table
    with pytest.raises(SystemExit, match="gone must be the output folder of a finished run of a recipe; received"):
        load("results_table").table([tmp_path / "gone"])


def test_paragraphs_of_a_text_file_distilled_with_an_activation_aware_start(call, tmp_path):
    (tmp_path / "novel.txt").write_text("\n\n".join(reviews(60)[0]))
    text = {"dataset_name": tmp_path / "novel.txt", "max_train_samples": None, "block_size": 16}
    teacher = call(method="dense", **text).rename(tmp_path / "teacher")
    taught = {"teacher": teacher, "distillation_weight": 0.5, "init_weights": "activation_aware"}
    metrics = read(call(**text, **taught) / "all_results.json")
    assert metrics["validation_tokens"] == 16 * metrics["validation_samples"] > 0
    with pytest.raises(ValueError, match="teacher and student must have the same tokens"):
        call(**text, **taught, vocabulary_size=320)


# ------------------------------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"block_size": 33},
            "block_size must be ≤ 32, the model's positions; received 33. Leave it out to use them all",
        ),
        (
            {"max_new_tokens": 32},
            "max_new_tokens must be < 32, the model's positions, .*; received 32. Lower it; 0: no sa",
        ),
        ({"text_column": "body"}, "text_column must be one of text; received 'body'"),
        (
            {"max_eval_samples": 1},
            r"the validation split must fill a block of 32 tokens; received '\d+ tokens'. Lower bl",
        ),
        (
            {"adversarial_attack": "fgsm", "adversarial_epsilon": 0.1},
            "adversarial_attack must be none for a language mo",
        ),
    ],
)
def test_what_no_language_model_can_be_trained_on(call, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["a b", None],
            "every row must have a text in column text of the train split; received None. Mend or remove row 1",
        ),
        (["", " "], "the train split must hold text; received '2 empty rows'"),
        (["a b"], "a validation split is held out of two documents or more; received 1"),
        ([1, 2], r"one column of text, or --text_column must name it; received \[\]"),
    ],
)
def test_texts_that_are_none(call, tmp_path, texts, message):
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        call(dataset_name=tmp_path / "train.parquet")


def test_a_tokenizer_without_an_end_of_text(call, tmp_path):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_backend([]))
    tokenizer.save_pretrained(tmp_path / "start")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=32, vocab_size=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    with pytest.raises(
        ValueError, match=r"parted by the tokenizer's end-of-text token; received None\. Set its eos_to"
    ):
        call(model_name_or_path=tmp_path / "start", model_type=None, config_overrides=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 1}, "block_size must be ≥ 2; received 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be ≥ 0; received -1"),
        ({"prompt": ""}, "the prompt must have words; received ''"),
    ],
)
def test_a_wrong_argument_is_said(capsys, wrong, message):
    with pytest.raises(SystemExit):
        load("language_modeling").parse(words(output_dir="o", **wrong))
    assert message in capsys.readouterr().err
