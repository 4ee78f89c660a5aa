"""Data of the studies, tiny."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from tests.text_models import reviews


def pictures(shape, count, classes, seed):
    """Images whose brightness tells the class, and noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    pixels = generator.integers(0, 60, (count, *shape)) + (190 * labels / classes).reshape(-1, *[1] * len(shape))
    columns = {"image": [Picture.fromarray(p.astype(np.uint8)) for p in pixels], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(num_classes=classes)}))


@pytest.fixture(scope="package")
def data_dir(tmp_path_factory):
    """A folder of small data sets: MNIST and SST-2."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    for split, count in (("train", 80), ("test", 30)):
        pictures((28, 28), count, 10, len(split)).to_parquet(folder / "mnist" / f"{split}.parquet")
    (folder / "sst2").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        sentences, labels = reviews(64, seed)
        columns = {"sentence": sentences, "label": labels}
        Dataset.from_dict(columns).to_parquet(folder / "sst2" / f"{split}.parquet")
    return str(folder)
