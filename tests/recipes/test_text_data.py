"""Data sets of the text recipe: what is read in which form, and what is wrong with one is said with split and row."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tests.recipes.recipe_runs import load

SST = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})


@pytest.fixture(scope="module")
def texts():
    return load("text_data")


def read(texts, folder, **options):
    return texts.load_data(texts.DataArguments(str(folder), **options))


def write(file, features=None, **columns):
    file.parent.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return file


def rows(n=8):
    return {"sentence": [f"text {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_file_of_each_kind(texts, tmp_path, kind):
    file, data = tmp_path / f"reviews.{kind}", Dataset.from_dict(rows())
    if kind == "parquet":
        data.to_parquet(file)
    elif kind == "csv":
        file.write_text("sentence,label\n" + "".join(f'"{row["sentence"]}",{row["label"]}\n' for row in data))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
    splits = read(texts, file, validation_fraction=0.25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 2}
    assert set(splits["train"].column_names) == {"text", "labels", "row"}
    assert splits["train"].features["labels"] == ClassLabel(names=["0", "1"])
    assert {
        text: label for split in splits.values() for text, label in zip(split["text"], split["labels"], strict=True)
    }["text 3"] == 1


def test_a_folder_of_splits_with_a_pair_of_sentences(texts, tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("idx,question1,question2,label\n0,who,what,no\n1,when,when,yes\n")
    splits = read(texts, tmp_path)
    assert set(splits) == {"train", "validation", "test"}
    assert splits["test"][:] == {
        "text": ["who", "when"],
        "text_pair": ["what", "when"],
        "labels": [0, 1],
        "row": [0, 1],
    }
    swapped = read(texts, tmp_path, text_columns=["question2", "question1"])
    assert swapped["test"][0]["text"] == "what"
    assert "text_pair" not in read(texts, tmp_path, text_columns=["question1"])["test"].column_names


def test_a_license_beside_other_files_does_not_make_them_text(texts, tmp_path):
    write(tmp_path / "data" / "train.parquet", **rows())
    (tmp_path / "data" / "LICENSE.txt").write_text("Free.\n\nOf charge.")
    assert sum(map(len, read(texts, tmp_path / "data").values())) == 8


def test_a_folder_of_text_files_is_read_by_paragraphs(texts, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "novel.txt").write_text("One\nparagraph.\n\nAnother.")
    (tmp_path / "README.md").write_text("Novels.")
    splits = load("data_splits").read_splits(str(tmp_path))
    assert {name: list(rows["text"]) for name, rows in splits.items()} == {
        name: ["One\nparagraph.", "Another."] for name in ("train", "test")
    }


def test_splits_without_known_labels_are_no_test_splits(texts, tmp_path):
    write(tmp_path / "train.parquet", SST, **rows())
    write(tmp_path / "test.parquet", SST, sentence=["a"], label=[-1])
    assert set(read(texts, tmp_path)) == {"train", "validation"}
    (tmp_path / "csv").mkdir()
    write(tmp_path / "csv" / "train.parquet", **rows())
    splits = load("data_splits").read_splits(str(tmp_path / "csv"))
    splits["test"] = Dataset.from_dict({"sentence": ["a"]})
    arguments = texts.DataArguments("d")
    assert "test" not in load("labelled_data").labelled(splits, arguments, {"sentence": "text"}, ("label",))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": ["x"], "b": ["y"], "label": [0]}, {}, r"one column of text, or --text_columns must name it; .*'a', 'b'"),
        (
            {"label": [0, 1]},
            {},
            r"one column of text, or --text_columns must name it; received \[\]. The columns are l",
        ),
        (
            rows(),
            {"text_columns": ["sentence", "other"]},
            "text_columns must be one of sentence, label; received 'other'",
        ),
        (rows(), {"text_columns": ["sentence", "label"]}, "text_columns must hold text, as sentence does; .*'label': "),
        ({"sentence": ["a"]}, {}, r"one column of ClassLabel, or --label_column must name it; received \[\]"),
        (rows(), {"label_column": "class"}, "label_column must be one of sentence, label; received 'class'"),
        (
            {"sentence": ["a", None], "label": [0, 1]},
            {},
            "must have a text in column sentence of the train split; .*row 1",
        ),
        ({"sentence": ["a", "b"], "label": [0, None]}, {}, "labels of the train split must be classes.*None.*row 1"),
        (
            {"sentence": ["a"] * 3, "label": [0.5, 1.0, 2.0]},
            {},
            "labels must be classes, not numbers with a fract.*0.5",
        ),
        ({"sentence": ["a", "b"], "label": [1, 1]}, {}, r"must hold at least two classes; received \['1'\]"),
    ],
)
def test_data_that_no_classifier_can_be_trained_on(texts, tmp_path, columns, options, message):
    with pytest.raises(ValueError, match=message):
        read(texts, write(tmp_path / "train.parquet", **columns), **options)


def test_a_label_out_of_range(texts, tmp_path):
    write(tmp_path / "train.parquet", SST, **rows())
    write(tmp_path / "validation.parquet", sentence=["a", "b"], label=[0, 2])
    with pytest.raises(ValueError, match=r"none of its splits may be empty|labels of the validation split"):
        read(texts, tmp_path)
    write(tmp_path / "numbers" / "train.parquet", **rows())
    write(tmp_path / "numbers" / "validation.parquet", sentence=["a", "b"], label=[0, 2])
    message = (
        "labels of the validation split must be classes of the training split, 0, 1; received 2. It stands in row 1"
    )
    with pytest.raises(ValueError, match=message):
        read(texts, tmp_path / "numbers")


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.csv", "sentence,label\n"), ("a.json", ""), ("a.csv", None)]
)
def test_data_that_are_not_there(texts, tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"must be a data set that load_dataset reads|a split must have rows"):
        read(texts, tmp_path / name)


def test_docstrings_are_texts_of_several_libraries_each_once(monkeypatch):
    module = load("docstrings")
    monkeypatch.setattr(module, "MOST", 30)
    data = module.docstrings()
    found = [text for split in data.values() for text in split["text"]]
    assert len(found) == len(set(found)) >= 120
    assert all(len(text.split()) >= 6 and ">>>" not in text for text in found)
    assert set(data["train"]["label"]) == {0, 1, 2, 3}
    assert data["test"].features["label"].names == ["networkx", "numpy", "pandas", "sympy"]
