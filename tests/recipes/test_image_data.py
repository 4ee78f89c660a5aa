"""Data sets of the image recipe: what is read in which form, and what is wrong with one is said with file or row."""

import logging
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ViTImageProcessorPil

from tests.recipes.recipe_runs import load

GREY = Picture.new("L", (8, 8))
KINDS = ClassLabel(names=["cat", "dog", "emu"])


@pytest.fixture(scope="module")
def images():
    return load("image_data")


def write(folder, labels=KINDS, /, **splits):
    """A parquet file for each split with these labels; a split of pairs (cell, label) has pictures of its own."""
    folder.mkdir(exist_ok=True)
    for name, values in splits.items():
        rows = [value if isinstance(value, tuple) else (GREY, value) for value in values]
        columns = {"image": [cell for cell, _ in rows], "label": [label for _, label in rows]}
        Dataset.from_dict(columns, features=Features({"image": Image(), "label": labels})).to_parquet(
            folder / f"{name}.parquet"
        )
    return folder


def read(images, folder, **options):
    return images.load_data(images.DataArguments(str(folder), **options))


def transform(images, channels=3, size=8):
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, do_normalize=False)
    return images.Transform(processor, channels, "train")


def test_a_parquet_file_with_columns_named_and_labels_as_text(images, tmp_path):
    rows = {"picture": [GREY] * 20, "other": [GREY] * 20, "kind": ["cat", "dog"] * 10}
    features = Features({"picture": Image(), "other": Image(), "kind": Value("string")})
    file = tmp_path / "train.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(file)
    data = read(images, file, image_column="picture", label_column="kind", validation_fraction=0.2)
    assert {name: len(split) for name, split in data.items()} == {"train": 16, "validation": 4}
    assert data["train"].features["labels"] == ClassLabel(names=["cat", "dog"])
    assert sorted(data["validation"]["labels"]) == [0, 0, 1, 1]
    assert sorted([*data["train"]["row"], *data["validation"]["row"]]) == list(range(20))
    with pytest.raises(ValueError, match=r"one column of Image, or --image_column must name it; received .*'other'"):
        read(images, file, label_column="kind")
    with pytest.raises(ValueError, match="label_column must be one of picture, other, kind; received 'colour'"):
        read(images, file, image_column="other", label_column="colour")


def test_a_test_split_with_secret_labels_is_left_out(images, tmp_path):
    assert set(read(images, write(tmp_path, train=[0, 1], validation=[0, 1], test=[-1, -1]))) == {"train", "validation"}


@pytest.mark.parametrize(
    ("kind", "train", "test"),
    [
        (Value("string"), ["dog", "cat", "emu"], ["emu", "cat"]),  # a test split without dogs
        (Value("int64"), [10, 9, 100], [100, 9]),
        (Value("bool"), [True, False, True], [True, False]),
    ],
)
def test_labels_mean_the_same_class_in_every_split(images, tmp_path, kind, train, test):
    data = read(images, write(tmp_path, kind, train=train, validation=train, test=test), label_column="label")
    names = data["train"].features["labels"].names
    assert names == [str(value) for value in sorted(set(train))]
    for split, values in (("train", train), ("test", test)):
        assert [names[label] for label in data[split]["labels"]] == [str(value) for value in values]


@pytest.mark.parametrize(
    ("kind", "splits", "message"),
    [
        (Value("int64"), {"train": [0, 1]}, r"one column of ClassLabel, or --label_column must name it; received \[\]"),
        (KINDS, {"train": [0] * 9}, r"must hold at least two classes; received \['cat'\]. Is this the label column"),
        (
            KINDS,
            {"train": [0, 1], "validation": []},
            "none of its splits may be empty; received ValueError: .*validation",
        ),
        (KINDS, {"train": [0, 1], "test": []}, "none of its splits may be empty; received ValueError: .*test"),
        (KINDS, {"train": [0, 0, 1]}, r"a class needs two samples or more for a validation split; received \['dog'\]"),
        (KINDS, {"train": [0, 0, 1, 1]}, "should be greater or equal to the number of classes.*Change validation_frac"),
        (
            KINDS,
            {"train": [0, 1, -1]},
            "labels of the train split must be classes.*, cat, dog, emu; received -1.*row 2",
        ),
        (KINDS, {"train": [0, 1, None]}, "labels of the train split must be classes.*received None.*row 2"),
        (KINDS, {"validation": [0, 1]}, r"must have a split named train; received \['validation'\]"),
    ],
)
def test_data_that_no_classifier_can_be_trained_on(images, tmp_path, kind, splits, message):
    with pytest.raises(ValueError, match=message):
        read(images, write(tmp_path / "data", kind, **splits))


def test_data_that_are_not_there(images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    for name in ("empty", "gone", "train.parquet"):
        with pytest.raises(ValueError, match=f"{name} must be a data set that load_dataset reads, .*; received "):
            read(images, tmp_path / name)


def test_a_class_that_is_not_in_the_training_split(images, tmp_path):
    folder = write(tmp_path, Value("string"), train=["cat", "dog"], validation=["cat", "cow"])
    message = "labels of the validation split must be classes of the training split, cat, dog; received 'cow'. .*row 1"
    with pytest.raises(ValueError, match=message):
        read(images, folder, label_column="label")


# ------------------------------------------------------------------------------------------------------ the images


def test_grey_and_colour_images_become_what_the_model_takes(images, caplog):
    red, grey = Picture.new("RGB", (8, 8), (255, 0, 0)), Picture.new("L", (8, 8), 51)
    rows = Dataset.from_dict({"image": [grey, red, grey], "labels": [0, 1, 0], "row": [0, 1, 2]})
    rows = rows.cast_column("image", Image(decode=False))
    colour = transform(images, 3)(rows[:])["pixel_values"]
    assert torch.equal(colour[0], torch.full((3, 8, 8), 0.2)) and colour[1, :, 0, 0].tolist() == [1, 0, 0]
    assert caplog.messages == [
        "grey images for a colour model: they are repeated in each channel (row 0 of the train split)"
    ]
    caplog.clear()
    weighed = transform(images, 1)(rows[:])["pixel_values"]
    assert weighed.shape == (3, 1, 8, 8)
    assert weighed[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.299, 0.2], abs=2e-3)
    assert caplog.messages == ["colour images for a grey model: they are weighed to grey (row 1 of the train split)"]
    with pytest.raises(ValueError, match=r"must take images of 1 or 3 channels; received 4\. Set num_channels"):
        transform(images, 4)


def test_no_word_where_images_and_model_agree(images, caplog):
    rows = Dataset.from_dict({"image": [GREY], "labels": [0], "row": [0]}).cast_column("image", Image(decode=False))
    with caplog.at_level(logging.WARNING):
        transform(images, 1)(rows[:])
    assert not caplog.messages


def broken_png():
    """The header of a picture, and a chunk whose checksum is wrong."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDATjunk" + b"\0\0\0\0"


@pytest.mark.parametrize("content", [b"no picture", b"", broken_png()], ids=["text", "empty", "damaged"])
def test_an_unreadable_image_is_named_by_its_file(images, tmp_path, content):
    for kind in ("cat", "dog"):
        for i in range(4):
            path = tmp_path / "train" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            GREY.save(path)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(content)
    rows = read(images, tmp_path, validation_fraction=0.5)
    message = (
        r"an image must be readable; received \w+Error: .* in row 6 of the train split \(.*train/dog/2.png\). Mend"
    )
    with pytest.raises(ValueError, match=message):
        for split in rows.values():
            transform(images)(split[:])


def test_an_unreadable_image_is_named_by_its_row(images, tmp_path):
    cells = [(GREY, 0), (GREY, 1), ({"bytes": b"no picture", "path": None}, 1)]
    data = read(images, write(tmp_path, train=cells, validation=[0, 1]))
    with pytest.raises(
        ValueError, match=r"received UnidentifiedImageError: .* in row 2 of the train split\. Mend or rem"
    ):
        transform(images)(data["train"].shuffle(seed=0)[:])


def test_sixteen_bits_are_refused_rather_than_cut_off(images):
    deep = Picture.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    rows = Dataset.from_dict({"image": [deep], "labels": [0], "row": [5]}).cast_column("image", Image(decode=False))
    message = re.escape("8 bits a channel; received 'I;16'. Convert row 5 of the train split.")
    with pytest.raises(ValueError, match=message):
        transform(images, 1)(rows[:])
