"""`text_classification.py`, copied alone into an empty folder: every kind of model, pairs, and wrong data."""

import copy
import logging

import pytest
import tokenizers
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_condlr import LowRankLinear
from tests.recipes.recipe_runs import ANY, copied, parse, read, run, words
from tests.text_models import classifier, framed, reviews, word_tokenizer

BERT = (
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, vocab_size: 300, "
    "max_position_embeddings: 64}"
)
FRESH = ANY | {"model_type": "bert", "config_overrides": [BERT], "attack_checks": False, "max_train_samples": 32}
FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copied("text_classification", tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    for seed, (split, size) in enumerate({"train": 64, "validation": 16, "test": 37}.items()):
        texts, labels = reviews(size, seed)
        rows = {"sentence": texts, "label": labels.tolist()}
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def call(recipe, sentences, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    return lambda **options: run(recipe, tmp_path / "out", **FRESH | {"dataset_name": sentences} | options)


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
    [("Bert", "condlr"), ("Roberta", "lowrank"), ("DistilBert", "dense"), ("GPT2", "condlr"), ("Bart", "dense")],
)
def test_every_kind_of_model_loads_back_as_it_was_evaluated(call, sentences, tmp_path, caplog, name, method):
    attacked = {"attacks": "pgd-embedding", "epsilons": 0.1, "attack_steps": 1, "max_attack_samples": 8}
    out = call(**pretrained(tmp_path / "start", name), method=method, **attacked if method == "condlr" else {})
    assert "texts of the train split are cut to 6" in caplog.text  # 64 positions, of which RoBERTa gives one to padding
    metrics = read(out / "test_results.json")
    assert metrics["test_samples"] == 37
    if method == "condlr":
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
    assert loss == pytest.approx(metrics["test_loss"], rel=1e-4)  # with any padding of the batch


def test_pairs_from_a_csv_file_on_a_fresh_model(call, tmp_path):
    """Whether the second sentence is the first: only both together tell, and segments tell them apart."""
    texts, _ = reviews(48)
    lines = [f"{a},{a if i % 2 else texts[i - 1]},{'same' if i % 2 else 'other'}" for i, a in enumerate(texts)]
    (tmp_path / "pairs.csv").write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n")
    attacked = {"epsilons": 0.1, "attacks": ["fgm-embedding", "characters"], "max_attack_samples": 3}
    start = {"init_weights": "activation_aware"}
    pairs = {"dataset_name": tmp_path / "pairs.csv", "text_columns": ["premise", "hypothesis"]}
    out = call(**pairs, validation_fraction=0.25, **attacked, **start)
    metrics = read(out / "validation_results.json")
    assert (metrics["validation_samples"], metrics["validation_attacked_samples"]) == (12, 3)
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer("good film", "bad film")
    assert set(encoded["token_type_ids"]) == {0, 1} and len(tokenizer) <= 300
    assert tokenizer.decode(encoded["input_ids"]) == "<s>good film</s>bad film</s>"
    assert read(out / "robustness.json")["settings"]["columns"] == ["text", "text_pair", "labels"]
    with pytest.raises(ValueError, match=r"pairs need a tokenizer that separates two texts; received .*Join the two"):
        call(**pairs, **pretrained(tmp_path / "start", "GPT2"))


def test_adversarial_training_and_distillation(call, tmp_path):
    teacher = call(method="dense", max_train_samples=64).rename(tmp_path / "teacher")
    options = {"adversarial_attack": "pgd", "adversarial_epsilon": 0.1, "adversarial_steps": 1, "trades_beta": 6}
    out = call(teacher=teacher, distillation_weight=0.5, logging_steps=1, max_train_samples=64, **options)
    logged = [entry for entry in read(out / "trainer_state.json")["log_history"] if "loss" in entry]
    assert [entry["adversarial_epsilon"] for entry in logged] == pytest.approx([0, 0, 0.05, 0.1])
    wider = [BERT.replace("vocab_size: 300", "vocab_size: 310")]
    with pytest.raises(ValueError, match="teacher and student must have the same tokens; received 300 and 310"):
        call(max_train_samples=64, teacher=teacher, distillation_weight=0.5, config_overrides=wider)


# ------------------------------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": ["x", "y"], "b": ["x", "y"], "label": [0, 1]},
            {},
            "one column of text, or --text_columns must name it; rec",
        ),
        (
            {"text": ["x", "y"], "label": [0, 1]},
            {"text_columns": "other"},
            r"text_columns must be one or two of text, label, source_row that hold text; received \['other'\]",
        ),
        (
            {"text": ["x", "y"], "label": [0, 1]},
            {"text_columns": ["text", "label"]},
            "that hold text; received",
        ),
        ({"text": ["x", "y"]}, {}, "one column of class labels, or --label_column must name it; received none"),
        ({"text": ["x", None] * 4, "label": [0, 1] * 4}, {}, r"received no text in row \d of the train split"),
    ],
)
def test_data_that_do_not_fit(recipe, tmp_path, columns, options, message):
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    args = parse(
        recipe,
        words(**FRESH, output_dir="o", dataset_name=tmp_path / "train.parquet", validation_fraction=0.5, **options),
    )
    with pytest.raises(ValueError, match=message):
        recipe.load_data(args[1])


def test_tokens_and_lengths_that_do_not_fit(call, recipe, tmp_path):
    with pytest.raises(ValueError, match=r"max_length must lie in \[3, 64\], what the model takes; received 65"):
        call(max_length=65)
    with pytest.raises(ValueError, match="attacks must be on tokens or texts; received pgd-linf"):
        call(attacks="pgd-linf", epsilons=0.1, dataset_name="gone")
    start = pretrained(tmp_path / "start", "Bert")
    word_tokenizer([f"w{i}" for i in range(400)]).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="tokens must lie in the model's vocabulary of 261; received 405"):
        call(**start)
    start = pretrained(tmp_path / "decoder", "GPT2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "decoder", pad_token="<eos>")
    model = copy.deepcopy(classifier("GPT2", vocab_size=len(tokenizer), pad_token_id=5))  # the cached one stays
    recipe.fit(tokenizer, model, None, pairs=False)
    assert model.config.pad_token_id == tokenizer.pad_token_id != 5
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_backend([])).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="must have a token for padding or for the end of a text; received neither"):
        call(**start)


def test_texts_without_a_token(call, tmp_path, caplog):
    """A frame is something to read; a tokenizer without one leaves nothing of an empty text."""
    rows = {"text": ["good", "", "bad", " ", "fine", "poor"] * 3, "label": ["a", "b"] * 9}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with caplog.at_level(logging.WARNING):
        call(dataset_name=tmp_path / "train.parquet", num_train_epochs=0)
    with pytest.raises(ValueError, match=r"must have at least one token; received none in row \d+ of the train split"):
        call(dataset_name=tmp_path / "train.parquet", **pretrained(tmp_path / "start", "GPT2"))
