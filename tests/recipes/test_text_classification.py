"""`recipes/text_classification.py` as a user runs it: every kind of model, its methods, restarted, wrongly called."""

import copy
import logging
import re

import pytest
import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_condlr import LowRankLinear
from tests.recipes.recipe_runs import ANY, load, read, train, words
from tests.text_models import classifier, framed, reviews, word_tokenizer

BERT = (
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
    "max_position_embeddings: 64}"
)
FRESH = ANY | {"model_type": "bert", "config_overrides": [BERT], "vocabulary_size": 300, "attack_checks": False}
FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})


def write_reviews(folder, **sizes):
    for seed, (split, size) in enumerate(sizes.items()):
        texts, labels = reviews(size, seed)
        rows = {"sentence": texts, "label": labels.tolist()}
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("reviews"), train=64, validation=16, test=37)


@pytest.fixture
def call(sentences, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    defaults = {"dataset_name": sentences}
    return lambda **options: train(tmp_path / "out", "text_classification", FRESH, **defaults | options)


def byte_backend(symbols):
    names = [*symbols, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def pretrained(folder, name):
    """A tiny checkpoint with a tokenizer of bytes; that of a decoder knows the end of a text and no padding."""
    if name in ("GPT2", "Llama"):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=byte_backend(["<eos>"]), eos_token="<eos>", padding_side="left"
        )
        special = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    else:
        tokenizer = framed(byte_backend(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        special = {}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_labels": 7, "initializer_range": 0.1}
    classifier(name, **sizes, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model_name_or_path": folder, "model_type": None, "config_overrides": None}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("Bert", "condlr"),
        ("Roberta", "lowrank"),
        ("DistilBert", "dense"),
        ("ModernBert", "condlr"),
        ("GPT2", "condlr"),
        ("Llama", "lowrank"),
        ("Bart", "dense"),
    ],
)
def test_every_kind_of_model_loads_back_as_it_was_evaluated(call, sentences, tmp_path, caplog, name, method):
    attacked = {"epsilons": 0.1, "attack_steps": 1, "max_attack_samples": 8} if name in ("Bert", "GPT2") else {}
    out = call(**pretrained(tmp_path / "start", name), method=method, max_train_samples=32, **attacked)
    assert "texts of the train split are cut to 6" in caplog.text  # 64 positions, of which RoBERTa gives one to padding
    metrics = read(out / "test_results.json")
    assert metrics["test_samples"] == 37
    if attacked:
        assert metrics["test_robust_accuracy"] == metrics["test_accuracy_pgd_embedding_0.1"] <= 1
        assert metrics["test_attacked_samples"] == 8
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(out).eval(),
        AutoTokenizer.from_pretrained(out),
    )
    assert any(isinstance(module, LowRankLinear) for module in model.modules()) == (method != "dense")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 63 if name == "Roberta" else 64)
    rows = Dataset.from_parquet(str(sentences / "test.parquet"))
    batch = tokenizer(list(rows["sentence"]), truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=torch.tensor(rows["label"])).loss.item()
    assert loss == pytest.approx(metrics["test_loss"], rel=1e-4)  # whatever the padding of the batch


def test_without_a_model_and_data_docstrings_train_a_small_one(monkeypatch, tmp_path):
    monkeypatch.setattr(load("docstrings"), "MOST", 40)
    options = {
        "model_type": None,
        "config_overrides": None,
        "attacks": ["pgd-embedding", "characters"],
        "epsilons": 0.1,
    }
    out = train(
        tmp_path / "out",
        "text_classification",
        FRESH,
        max_train_samples=32,
        attack_steps=1,
        max_attack_samples=4,
        **options,
    )
    metrics, config = read(out / "test_results.json"), read(out / "config.json")
    assert metrics["test_robust_accuracy"] <= metrics["test_accuracy_characters_0.1"] <= 1
    assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("bert", 128, 300)
    assert config["id2label"] == {"0": "networkx", "1": "numpy", "2": "pandas", "3": "sympy"}
    assert all((out / name).is_file() for name in ("condlr.safetensors", "tokenizer.json", "robustness.json"))
    attacked = ModelCard.load(out / "README.md").data.eval_results
    assert {result.metric_args["epsilon"] for result in attacked if result.metric_type == "robust_accuracy"} == {0.1}
    saved = {"model_name_or_path": out, "model_type": None, "config_overrides": None, "num_train_epochs": 0}
    again = train(tmp_path / "again", "text_classification", FRESH, **saved)
    assert read(again / "test_results.json")["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_pairs_from_a_csv_file_with_an_activation_aware_start(call, tmp_path):
    """Whether the second sentence is the first: only both together tell, and segments tell them apart."""
    texts, _ = reviews(48)
    lines = [f"{a},{a if i % 2 else texts[i - 1]},{'same' if i % 2 else 'other'}" for i, a in enumerate(texts)]
    (tmp_path / "pairs.csv").write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n")
    attacked = {"epsilons": 0.1, "attacks": "fgm-embedding", "max_attack_samples": 3}
    start = {"init_weights": "activation_aware", "calibration_samples": 16}
    out = call(dataset_name=tmp_path / "pairs.csv", validation_fraction=0.25, **attacked, **start)
    metrics = read(out / "validation_results.json")
    assert (metrics["validation_samples"], metrics["validation_attacked_samples"]) == (12, 3)
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer("good film", "bad film")
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert tokenizer.decode(encoded["input_ids"]) == "<s>good film</s>bad film</s>"
    assert read(out / "robustness.json")["settings"]["columns"] == ["text", "text_pair", "labels"]


def test_pairs_that_a_tokenizer_would_glue_together_are_refused(call, tmp_path):
    (tmp_path / "pairs.csv").write_text("premise,hypothesis,label\n" + "one,two,same\nthree,four,other\n" * 9)
    with pytest.raises(ValueError, match=r"between two texts; received '.*, which glues them together'. Join the two"):
        call(dataset_name=tmp_path / "pairs.csv", **pretrained(tmp_path / "start", "GPT2"))


def test_adversarial_training_and_distillation(call, sentences, tmp_path):
    teacher = call(method="dense").rename(tmp_path / "teacher")
    options = {"adversarial_attack": "pgd", "adversarial_epsilon": 0.1, "adversarial_steps": 1, "trades_beta": 6}
    out = call(teacher=teacher, distillation_weight=0.5, logging_steps=1, **options)
    logged = [entry for entry in read(out / "trainer_state.json")["log_history"] if "loss" in entry]
    assert [entry["adversarial_epsilon"] for entry in logged] == pytest.approx([0, 0, 0.05, 0.1])
    out.rename(tmp_path / "taught")
    with pytest.raises(
        ValueError, match="teacher and student must have the same tokens; received '300 and 310 that di"
    ):
        call(teacher=teacher, distillation_weight=0.5, vocabulary_size=310)


# ------------------------------------------------------------------------------------------------------ wrong calls

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"attacks": "pgd-linf", "epsilons": 0.1},
            r"data have attacks on tokens or texts; received \['pgd-linf'\]",
        ),
        ({"max_length": 2}, "max_length must be ≥ 3; received 2"),
        ({"text_columns": ["a", "b", "c"]}, "text_columns must be one column or two different ones; received .*'c'"),
        ({"text_columns": ["a", "a"]}, "text_columns must be one column or two different ones; received .*'a'"),
        ({"vocabulary_size": 200}, "vocabulary_size must be ≥ 300, of which 260 are bytes; received 200"),
        ({"model_type": "bert"}, "one of model_name_or_path and model_type must be given; received .*'model_type'"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(capsys, wrong, message):
    with pytest.raises(SystemExit):
        load("text_classification").parse(words(**NEEDED | wrong))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


def test_more_tokens_than_the_model_has_positions_for(call):
    message = "max_length must be ≤ 64, the tokens that model and tokenizer take; received 65"
    with pytest.raises(ValueError, match=message):
        call(max_length=65)


def test_a_tokenizer_that_cannot_pad(call, tmp_path):
    start = pretrained(tmp_path / "start", "GPT2")
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_backend([])).save_pretrained(tmp_path / "start")
    with pytest.raises(
        ValueError, match=r"must have a padding token, or one for the end of a text .*; received 'neither'"
    ):
        call(**start)


def test_the_model_knows_the_token_that_the_tokenizer_pads_with(tmp_path):
    """Also where its config names another one, which the tokenizer does not have."""
    start = pretrained(tmp_path, "GPT2")["model_name_or_path"]
    text_model, tokenizer = load("text_model"), AutoTokenizer.from_pretrained(start)
    model = copy.deepcopy(classifier("GPT2", vocab_size=len(tokenizer), pad_token_id=5))  # the cached one stays
    text_model.fit(text_model.padded(tokenizer), model, None)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id != 5


def test_a_tokenizer_of_another_model(call, tmp_path):
    start = pretrained(tmp_path / "start", "Bert")
    word_tokenizer([f"w{i}" for i in range(400)]).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="tokens must lie in the model's vocabulary of 261; received 405"):
        call(**start)


def test_texts_without_a_token(call, tmp_path, caplog):
    """A frame is something to read; a tokenizer without one leaves nothing of an empty text."""
    rows = {"text": ["good", "", "bad", " ", "fine", "poor"] * 3, "label": ["a", "b"] * 9}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with caplog.at_level(logging.WARNING):
        call(dataset_name=tmp_path / "train.parquet", num_train_epochs=0)
    assert "6 of 18 texts in column text of the train split are empty, that of row 1 first" in caplog.text
    message = "must have at least one token; received 'an empty one in row 1 of the train split'. Remove it, or take"
    with pytest.raises(ValueError, match=message):
        call(dataset_name=tmp_path / "train.parquet", **pretrained(tmp_path / "start", "GPT2"))
