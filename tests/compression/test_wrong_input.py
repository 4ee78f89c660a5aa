"""What `compress` refuses: each error names the rule and what was received, and nothing is written."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_condlr import CondLRConfig, compress, fold_model, get_robust_lowrank_model
from hf_condlr.compression.arguments import CompressionArguments
from hf_condlr.compression.data import data_digest, load_data
from hf_condlr.compression.tasks import task_of
from hf_condlr.errors import ConfigError, EvaluationError
from hf_condlr.robustness.attacks import PGD
from tests import models
from tests.compression.cases import NAMES, case, pictures, vit

QUICK = {"calibration_samples": 8, "max_eval_samples": 8, "batch_size": 8}


def assert_refused(error, match, out, task="image", model=None, data=None, processor=None, **options):
    own = case(task)
    options = {"ratio": 0.4, "attacks": ()} | options
    with pytest.raises(error, match=match):
        compress(
            own[0] if model is None else model,
            own[1] if data is None else data,
            output_dir=out,
            processor=own[2] if processor is None else processor,
            **QUICK,
            **options,
        )


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": None}, r"exactly one of ratio and max_drop must be given; received neither"),
        ({"max_drop": 1.0}, r"exactly one of .*; received ratio=0.4 and max_drop=1.0"),
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\); received 1.0"),
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\); received 0.0"),
        ({"ratio": 0.99}, r"ratio must leave rank 1 in every layer, here at most 0\.8\d+; received 0.99"),
        ({"ratio": None, "max_drop": -1.0}, r"max_drop must lie in \[0, 100\); received -1.0"),
        ({"form": "training"}, r"form must be one of factored, folded, pivoted; received training"),
        ({"tau": -1.0}, r"tau must be a number ≥ 0"),
        ({"rank_multiple": 0}, r"rank_multiple must be an integer ≥ 1"),
        ({"init_weights": "fischer"}, r"init_weights must be one of svd, .*; received 'fischer'"),
        ({"learning_rate": 1e-3}, r"learning_rate must come with recovery_steps"),
        ({"adversarial_epsilon": "1/255"}, r"adversarial_epsilon must come with recovery_steps"),
        ({"recovery_steps": -1}, r"recovery_steps must be ≥ 0"),
        ({"max_length": 8}, r"max_length is for texts; received 8"),
        ({"text_columns": ["image"]}, r"text_columns is for texts"),
        ({"attack_samples": 4}, r"attack_samples is for attacks, of which there are none; received 4"),
    ],
)
def test_options(options, match, out):
    assert_refused(ConfigError, match, out, **options)


@pytest.mark.parametrize("task", ["token", "language"])
def test_only_classifiers_are_attacked(task, out):
    assert_refused(ConfigError, r"of this model is not attacked; received pgd-linf", out, task, attacks=PGD(0.1))


def test_a_recovery_that_cannot_train_is_refused_before_anything_is_measured(out):
    options = {"recovery_steps": 2, "adversarial_epsilon": 0.1}
    assert_refused(ConfigError, "only classifiers of images and texts recover on adversarial", out, "token", **options)
    assert_refused(ConfigError, r"on adversarial samples; received robust=True", out, "language", robust=True)
    half = vit().bfloat16()
    assert_refused(
        ConfigError, r"trains factors in float32; received torch.bfloat16", out, model=half, recovery_steps=2
    )
    assert not out.exists()


@pytest.mark.parametrize("convert", [lambda model: model, fold_model])
def test_a_model_that_is_compressed_already(convert, out):
    model = convert(get_robust_lowrank_model(vit(), CondLRConfig(rank_ratio=0.5)))
    assert_refused(ConfigError, r"the model must be dense; received one that is compressed already", out, model=model)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: models.t5(), "compress takes classifiers .*; received T5ForConditionalGeneration"),
        (lambda: vit(problem_type="multi_label_classification"), "must predict one of several classes"),
        (lambda: models.vit(num_labels=1), "must predict one of several classes; received .* 1 labels"),
    ],
)
def test_a_model_of_another_task(model, match, out):
    assert_refused(ConfigError, match, out, model=model())


def test_no_processor(out):
    model, data, _ = case("image")
    with pytest.raises(ConfigError, match="made by its processor; received processor=None"):
        compress(model, data, ratio=0.4, output_dir=out)


def named(*names):
    return pictures(names=list(names))


def numbered(labels):
    features = Features({"sentence": Value("string"), "label": Value("int64")})
    rows = {"sentence": ["good film"] * len(labels), "label": labels}
    return DatasetDict({name: Dataset.from_dict(rows, features=features) for name in ("train", "test")})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "data must be a data set; received none"),
        ({"train": [1, 2]}, "data must be a data set; received dict"),
        (pictures(splits=("test",)), "must have a split named train; received .*test"),
        (pictures(splits=("train",)).map(lambda row: row), None),
        (DatasetDict(train=pictures()["train"], test=pictures()["test"].select([])), "received none in test"),
        (pictures().remove_columns("label"), "one column of class labels.*; received none"),
        (pictures().remove_columns("image"), "one column of images.*; received none"),
        (named(*NAMES, "f"), "classes of the model, of which there are 5; received 6: a, b, c, d, e and 1 more"),
        (named("b", "a", "x", "y", "z"), "classes of the model and of the data set must be the same"),
    ],
)  # fmt: skip
def test_data(data, match, out):
    if match is None:  # train alone is enough: rows of it are held out
        _, report = compress(
            vit(), data, ratio=0.4, output_dir=out.with_name("kept"), processor=case("image")[2], **QUICK
        )
        assert report.data["evaluation"] == "rows held out of train"
        return
    assert_refused(EvaluationError, match, out, data=data)


def test_too_few_rows_to_hold_some_out(out):
    data = pictures(rows=10, splits=("train",))
    assert_refused(EvaluationError, r"rows to hold out; received 10 rows in train", out, data=data)


def test_class_numbers_beyond_those_of_the_model(out):
    assert_refused(
        EvaluationError, "of which there are 3; received 4: 0, 1, 2, 7", out, "text", data=numbered([0, 1, 2, 7])
    )


def test_numbers_that_are_no_class_numbers(out):
    assert_refused(
        EvaluationError, "must be class numbers of the model, 0 to 2; received 7", out, "text", data=numbered([0, 7])
    )


def test_labels_that_are_numbers_are_class_numbers():
    model, _, processor = case("text")
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    task = task_of(model, processor, CompressionArguments(output_dir="", ratio=0.4))
    assert task.columns(load_data(numbered([0, 2, 2]), None)[0])["test"]["labels"][:] == [0, 2, 2]


def test_other_rows_are_other_data():
    rows = [str(i) for i in range(1000)]
    longer, later = [*rows, "x"], [*rows[:500], *rows[:500]]
    digests = [
        data_digest(DatasetDict(test=Dataset.from_dict({"text": texts}))) for texts in (rows, rows, longer, later)
    ]
    assert digests[0] == digests[1] and len({*digests}) == 3


def test_a_label_that_only_another_split_has(out):
    data = DatasetDict(train=numbered([0, 1, 0, 1])["train"], test=numbered([0, 2])["test"])
    assert_refused(
        EvaluationError, "labels of the test split must be classes of the training split", out, "text", data=data
    )


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    model, data, processor = case("image")
    swapped = data.map(lambda row: {"label": 4 - row["label"]}).cast_column("label", ClassLabel(names=NAMES[::-1]))
    reports = [
        compress(model, rows, ratio=0.4, output_dir=tmp_path / name, processor=processor, attacks=(), **QUICK)[1]
        for name, rows in (("plain", data), ("swapped", swapped))
    ]
    assert reports[0].dense.quality == reports[1].dense.quality
    assert reports[0].factored.quality == reports[1].factored.quality


def test_tags_without_a_word(out):
    _, data, _ = case("token")
    data["test"] = data["test"].map(lambda row: {"ner_tags": row["ner_tags"][:-1]})
    assert_refused(EvaluationError, "one label a word; received row 0 of the test split", out, "token", data=data)


def test_max_drop_that_no_ratio_satisfies(tmp_path):
    model, data, processor = case("image")
    labels = model.eval()(processor([x["image"] for x in data["validation"]], return_tensors="pt")["pixel_values"])
    predicted = labels.logits.argmax(-1).tolist()  # accuracy of dense: 1
    rows = data["validation"].remove_columns("label").add_column("label", predicted)
    data["validation"] = rows.cast_column("label", ClassLabel(names=NAMES))
    match = (
        r"falls by at most 0; received a fall of \d+\.\d\d at 0\.01, the least that is removed, and of .* tau=inf lets"
    )
    with pytest.raises(ConfigError, match=match):
        compress(model, data, max_drop=0.0, output_dir=tmp_path / "out", processor=processor, attacks=(), tau=0.0)


def test_a_folder_that_holds_something_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert_refused(ConfigError, r"must be new, empty, or of a run to resume; received .*out with thesis.tex", out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert_refused(ConfigError, r"output_dir must be a folder; received the file", out / "thesis.tex")


def test_a_run_with_other_settings(tmp_path):
    model, data, processor = case("image")
    call = {"output_dir": tmp_path / "out", "processor": processor, "attacks": (), **QUICK}
    compress(model, data, ratio=0.4, **call)
    for changes, match in (
        ({"ratio": 0.5}, r"with its own model, data and settings; received ratio 0.4 → 0.5\."),
        ({"ratio": 0.4, "tau": 1.0}, r"received tau 4.0 → 1.0\."),
        ({"ratio": 0.4, "attacks": PGD(0.1)}, r"received attacks \[\] → "),
    ):
        with pytest.raises(ConfigError, match=match):
            compress(model, data, **call | changes)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(ConfigError, match=r"received model '\w+' → '\w+'\."):
        compress(model, data, ratio=0.4, **call)
    with pytest.raises(ConfigError, match=r"received data '\w+' → '\w+'"):
        compress(case("image")[0], pictures(rows=30), ratio=0.4, **call)


def test_a_quality_that_is_not_a_number(out):
    model = vit()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    assert_refused(EvaluationError, r"the accuracy of the dense model must be a number; received nan", out, model=model)
