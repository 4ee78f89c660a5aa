"""Data of the studies, tiny."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from tests.text_models import reviews


def pictures(shape, count, classes, seed, names=("image", "label")):
    """Images whose brightness tells the class, and noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    pixels = generator.integers(0, 60, (count, *shape)) + (190 * labels / classes).reshape(-1, *[1] * len(shape))
    columns = {names[0]: [Picture.fromarray(p.astype(np.uint8)) for p in pixels], names[1]: labels.tolist()}
    features = {names[0]: Image(), names[1]: ClassLabel(num_classes=classes)}
    if names[1] == "fine_label":
        columns["coarse_label"], features["coarse_label"] = [0] * count, Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


@pytest.fixture(scope="package")
def data_dir(tmp_path_factory):
    """A folder of small data sets: MNIST, CIFAR-100 with the columns that it has on the Hub, and SST-2."""
    folder = tmp_path_factory.mktemp("data")
    for name, shape, classes, names in (
        ("mnist", (28, 28), 10, ("image", "label")),
        ("cifar100", (32, 32, 3), 100, ("img", "fine_label")),
    ):
        (folder / name).mkdir()
        for split, count in (("train", 80), ("test", 30)):
            rows = pictures(shape, count, classes, len(split), names)
            rows.to_parquet(folder / name / f"{split}.parquet")
    (folder / "sst2").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        sentences, labels = reviews(64, seed)
        columns = {"sentence": sentences, "label": labels}
        Dataset.from_dict(columns).to_parquet(folder / "sst2" / f"{split}.parquet")
    return str(folder)
