"""scikit-learn's handwritten digits as parquet files, a data set that needs no network.

python recipes/digits.py data/digits
"""

import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write_digits(folder: Path) -> None:
    """1,797 grey 8×8 images: 45 % train, 15 % validation, 40 % test, always the same."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    folder.mkdir(parents=True, exist_ok=True)
    for name, indices in {"train": train, "validation": validation, "test": test}.items():
        images = [Picture.fromarray((pixels[i].reshape(8, 8) * 255 / 16).round().astype("uint8")) for i in indices]
        split = Dataset.from_dict({"image": images, "label": labels[indices]}, features=features)
        split.to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/digits.py FOLDER")
    write_digits(Path(sys.argv[1]))
