"""`DatasetArguments`: what is read in which form, and what is wrong with data is named by split, row and file."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_condlr import DatasetArguments, find_column, labelled, readable_rows

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "fair", "good"])})


def write(file, features=None, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return file


def rows(n=8):
    return {"text": [f"text {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}


def places(number):
    return [f"row {i} of the train split" for i in range(number)]


def classes(folder, **options):
    """The splits of a classifier's training."""
    args = DatasetArguments(str(folder), **options)
    return args.hold_out(labelled(args.load(), "label", {"text": "text"}), "labels")


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_file_of_each_kind(tmp_path, kind):
    file, data = tmp_path / f"reviews.{kind}", Dataset.from_dict(rows())
    if kind == "parquet":
        data.to_parquet(file)
    elif kind == "csv":
        file.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in data))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
    splits = classes(file, validation_fraction=0.25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 2}
    assert splits["train"].features["labels"] == ClassLabel(names=["0", "1"])
    assert sorted(splits["validation"]["labels"]) == [0, 1]  # the shares of the classes
    assert sorted([*splits["train"]["source_row"], *splits["validation"]["source_row"]]) == places(8)
    assert DatasetArguments(str(file)).hub_name is None and DatasetArguments("glue").hub_name == "glue"


def test_a_license_next_to_other_files_does_not_make_them_text(tmp_path):
    write(tmp_path / "train.parquet", **rows())
    (tmp_path / "LICENSE.txt").write_text("Free.\n\nOf charge.")
    assert len(DatasetArguments(str(tmp_path)).load()["train"]) == 8


def test_a_folder_of_text_files_is_read_by_paragraphs(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "novel.txt").write_text("One\nparagraph.\n\nAnother.")
    (tmp_path / "README.md").write_text("Novels.")
    splits = DatasetArguments(str(tmp_path)).load()
    assert {name: list(part["text"]) for name, part in splits.items()} == {
        name: ["One\nparagraph.", "Another."] for name in ("train", "validation")
    }


def test_fewer_rows_the_same_for_every_seed(tmp_path):
    file = write(tmp_path / "train.parquet", **rows(40))
    first, again = (classes(file, max_train_samples=5, max_eval_samples=3) for _ in range(2))
    assert {name: len(part) for name, part in first.items()} == {"train": 5, "validation": 3}
    assert list(first["train"]["source_row"]) == list(again["train"]["source_row"]) != places(5)


@pytest.mark.parametrize(
    ("kind", "train", "test"),
    [
        (Value("string"), ["dog", "cat", "emu"], ["emu", "cat"]),  # a test split without dogs
        (Value("int64"), [10, 9, 100], [100, 9]),
        (Value("bool"), [True, False, True], [True, False]),
    ],
)
def test_labels_mean_the_same_class_in_every_split(tmp_path, kind, train, test):
    features = Features({"text": Value("string"), "label": kind})
    for name, labels in (("train", train), ("validation", train), ("test", test)):
        write(tmp_path / f"{name}.parquet", features, text=["a"] * len(labels), label=labels)
    data = classes(tmp_path)
    names = data["train"].features["labels"].names
    assert names == [str(value) for value in sorted(set(train))]
    for split, values in (("train", train), ("test", test)):
        assert [names[label] for label in data[split]["labels"]] == [str(value) for value in values]


def test_a_test_split_with_secret_labels_is_left_out(tmp_path):
    write(tmp_path / "train.parquet", FEATURES, **rows())
    write(tmp_path / "test.parquet", FEATURES, text=["a"], label=[-1])
    assert set(classes(tmp_path)) == {"train", "validation"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"train": [0] * 9},
            "training split must have two classes or more, not fractions; received bad. Is this the c",
        ),
        ({"train": [0, 0, 1]}, "The least populated class in labels column has only 1 member"),
        ({"train": [0, 0, 1, 1]}, "The test_size = 1 should be greater or equal to the number of classes = 2"),
        ({"train": [0, 1, -1]}, "labels of the train split must be classes.*, bad, fair; received -1 in row 2"),
        ({"train": [0, 1, None]}, "labels of the train split must be classes.*received None in row 2"),
        ({"train": [0, 1], "validation": [0, 1], "test": [1, 2]}, "labels of the test split .*received 2 in row 1"),
        ({"validation": [0, 1]}, r"must have a split named train; received \['validation'\]"),
        ({"train": [0, 1], "test": []}, "must be a data set that load_dataset reads, without an empty split"),
    ],
)
def test_data_that_no_classifier_can_be_trained_on(tmp_path, labels, message):
    for split, values in labels.items():
        write(tmp_path / "data" / f"{split}.parquet", FEATURES, text=["a"] * len(values), label=values)
    with pytest.raises(ValueError, match=message):
        classes(tmp_path / "data")


def test_labels_that_are_no_classes(tmp_path):
    file = write(tmp_path / "train.parquet", text=["a"] * 3, label=[0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"must have two classes or more, not fractions; received 0.5, 1.0, 2.0"):
        classes(file)
    write(tmp_path / "more" / "train.parquet", **rows())
    write(tmp_path / "more" / "test.parquet", words=["a"], label=[0])
    with pytest.raises(ValueError, match="must be a data set that load_dataset reads"):
        classes(tmp_path / "more")


def test_data_that_are_not_there_or_broken(tmp_path, caplog):
    good = write(tmp_path / "data" / "train-0.parquet", **rows())
    (tmp_path / "data" / "train-1.parquet").write_bytes(good.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"received ArrowInvalid: .* Name another one"):
        DatasetArguments(str(tmp_path / "data")).load()
    assert "data/train-1.parquet" in caplog.text
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": b}\n')
    with pytest.raises(ValueError, match=r"JSON parse error: .* in row 1"):
        DatasetArguments(str(tmp_path / "broken.jsonl")).load()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("text,label\n")
    for name in ("empty", "gone", "empty.csv"):
        with pytest.raises(ValueError, match=r"must be a data set that load_dataset reads|a split must have rows"):
            DatasetArguments(str(tmp_path / name)).load()


def problem(row):
    return "no text (a.csv)" if row["text"] is None else None


@pytest.mark.parametrize("processes", [0, 2])
def test_unreadable_rows_are_listed_or_left_out(processes, caplog):
    texts = ["a", None, "b", "c", None, "d"]
    data = DatasetDict(
        train=Dataset.from_dict({"text": texts, "source_row": places(6)}),
        test=Dataset.from_dict({"text": ["a"], "source_row": places(1)}),
    )
    assert len(readable_rows(DatasetDict(test=data["test"]), problem, processes=processes)["test"]) == 1
    first, second = (rf"no text \(a.csv\) in row {i} of the train split" for i in (1, 4))
    with pytest.raises(ValueError, match=f"every row must be readable; received {first}, {second}. Repair"):
        readable_rows(data, problem, processes=processes)
    kept = readable_rows(data, problem, skip=True, processes=processes)
    assert kept["train"]["text"] == ["a", "b", "c", "d"] and kept["test"]["text"] == ["a"]
    assert "2 rows of the train split are left out" in caplog.text


def test_the_column_that_is_meant():
    columns = {"a": Value("string"), "b": Value("string"), "c": Value("int64")}

    def choose(given, dtype="string"):
        return find_column(columns, "text_column", given, lambda _, kind: kind.dtype == dtype, "text")

    assert (choose("b"), choose(None, "int64")) == ("b", "c")
    with pytest.raises(
        ValueError, match=r"one column of text, or --text_column must name it; received a, b. The columns"
    ):
        choose(None)
    with pytest.raises(ValueError, match=r"text_column must be one of a, b, c; received 'd'"):
        choose("d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_samples": 0}, "max_train_samples must be ≥ 1; received 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\); received 1.0"),
    ],
)
def test_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        DatasetArguments("d", **options)
