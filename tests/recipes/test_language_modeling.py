"""`language_modeling.py`, copied alone into an empty folder: perplexities, blocks, tied embeddings, restarts."""

import math
import shutil

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_condlr import LowRankLinear
from tests.recipes.recipe_runs import ANY, copied, parse, read, run, words
from tests.recipes.test_text_classification import byte_backend
from tests.text_models import reviews

GPT2 = "{n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32, vocab_size: 300}"
LLAMA = (
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 48, "
    "max_position_embeddings: 32, vocab_size: 300}"
)
FRESH = ANY | {"model_type": "gpt2", "config_overrides": [GPT2]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copied("language_modeling", tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, size) in enumerate({"train": 60, "validation": 20, "test": 20}.items()):
        Dataset.from_dict({"text": ["", *reviews(size, seed)[0]]}).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def call(recipe, corpus, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    return lambda **options: run(recipe, tmp_path / "out", **FRESH | {"dataset_name": corpus} | options)


def perplexity(folder, texts, block_size=32):
    """By the definition, of the model as it loads back."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) - len(ids) % block_size]).reshape(-1, block_size)
    with torch.no_grad():
        scores = model(blocks).logits[:, :-1].log_softmax(-1).gather(-1, blocks[:, 1:, None])
    return model, math.exp(-scores.mean())


@pytest.mark.parametrize(
    ("model", "config", "method"), [("gpt2", GPT2, "condlr"), ("llama", LLAMA, "lowrank"), ("gpt2", GPT2, "dense")]
)
def test_perplexity_is_that_of_the_model_as_it_loads_back(call, corpus, model, config, method):
    fewer = {"max_eval_samples": None, "per_device_eval_batch_size": 3}  # 12 or so blocks: the last batch is not full
    out = call(model_type=model, config_overrides=[config], method=method, **fewer)
    metrics = read(out / "all_results.json")
    loaded, expected = perplexity(out, [t for t in Dataset.from_parquet(str(corpus / "test.parquet"))["text"] if t])
    assert metrics["test_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(metrics["test_loss"]), rel=1e-4)
    assert metrics["test_perplexity"] < metrics["start_perplexity"]
    assert metrics["test_tokens"] == 32 * metrics["test_samples"]
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules()) == (method != "dense")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (model == "gpt2")  # tied, or not
    assert (out / "README.md").is_file()


def test_an_interrupted_training_ends_as_an_uninterrupted_one(call, tmp_path, caplog):
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 2}  # GPT-2 has dropout
    uninterrupted = call(**options).rename(tmp_path / "uninterrupted")
    first = min(uninterrupted.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    shutil.copytree(first, tmp_path / "out" / first.name)
    shutil.copy(uninterrupted / "settings.json", tmp_path / "out")
    out = call(**options)
    assert f"resuming from {out / first.name}" in caplog.text
    names = ("start_perplexity", "eval_perplexity", "test_perplexity", "test_kappa_max")
    before, after = (read(folder / "all_results.json") for folder in (uninterrupted, out))
    assert [after[name] for name in names] == pytest.approx([before[name] for name in names], rel=1e-6)


def test_paragraphs_of_a_text_file_distilled_with_an_activation_aware_start(call, tmp_path):
    (tmp_path / "novel.txt").write_text("\n\n".join(reviews(60)[0]))
    text = {"dataset_name": tmp_path / "novel.txt", "max_train_samples": None, "block_size": 16}
    teacher = call(method="dense", **text).rename(tmp_path / "teacher")
    taught = {"teacher": teacher, "distillation_weight": 0.5, "init_weights": "activation_aware"}
    metrics = read(call(**text, **taught) / "all_results.json")
    assert metrics["validation_tokens"] == 16 * metrics["validation_samples"] > 0
    with pytest.raises(ValueError, match="teacher and student must have the same tokens"):
        call(**text, **taught, config_overrides=[GPT2.replace("vocab_size: 300", "vocab_size: 320")])


# ------------------------------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 33}, r"block_size must lie in \[2, 32\], the model's positions; received 33"),
        ({"text_column": "body"}, "text_column must be one of text; received 'body'"),
        ({"max_eval_samples": 1}, r"the validation split must fill a block of 32 tokens; received \d+\. Take smaller"),
        ({"adversarial_attack": "fgsm", "adversarial_epsilon": 0.1}, "only classifiers are trained on attacks"),
    ],
)
def test_what_no_language_model_can_be_trained_on(call, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a b", None], "received no text in row 1 of the train split"),
        (["", " "], "a split must hold text; received none in train"),
        (["a b"], "the resulting train set will be empty"),
        ([1, 2], "one column of text, or --text_column must name it; received none"),
    ],
)
def test_texts_that_are_none(recipe, tmp_path, texts, message):
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    args = parse(recipe, words(**FRESH, output_dir="o", dataset_name=tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=message):
        recipe.load_data(args[1])


def test_a_tokenizer_without_an_end_of_text(call, tmp_path):
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_backend([])).save_pretrained(tmp_path / "start")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=32, vocab_size=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"separated by the tokenizer's end-of-text token; received None"):
        call(model_name_or_path=tmp_path / "start", model_type=None, config_overrides=None)
