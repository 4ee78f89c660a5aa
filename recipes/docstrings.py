"""Docstrings of libraries that come with this one: real English with a class for each text, and no network.

    python recipes/docstrings.py data/docstrings

torch requires sympy and networkx, `datasets` requires numpy and pandas. What a docstring says in sentences is a text,
the library that it documents is its class; examples, parameters and headings are left out. All docstrings of a file
lie in the same split. Which texts there are depends on the versions that are installed.
"""

import ast
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

LIBRARIES = ("networkx", "numpy", "pandas", "sympy")
MOST = 1500  # texts of a library
PARTS = ("train", "train", "train", "train", "train", "train", "train", "validation", "test", "test")  # of 10 files
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> DatasetDict:
    """Columns `text` and `label`, splits train, validation and test; every text once."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for library in LIBRARIES:
        known = len(seen)
        for number, file in _files(library):
            if len(seen) - known >= MOST:
                break
            for text in dict.fromkeys(_texts(file)):
                if text not in seen:
                    splits[PARTS[number % len(PARTS)]].append({"text": text, "label": library})
                    seen.add(text)
    return DatasetDict({name: Dataset.from_list(rows, features=features) for name, rows in splits.items()})


def _files(library: str) -> list[tuple[int, Path]]:
    """The library's files but its tests, each with a number, in an order that only names decide."""
    root = Path(find_spec(library).origin).parent  # nothing is imported
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    numbered = [(int(sha256(name.encode()).hexdigest()[:8], 16), name) for name in names if "test" not in name]
    return [(number, root / name) for number, name in sorted(numbered)]


def _texts(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED):
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            prose = [" ".join(paragraph.split()) for paragraph in paragraphs if _is_prose(paragraph)]
            if prose:
                yield "\n".join(prose)


def _is_prose(paragraph: str) -> bool:
    lines = paragraph.strip("\n").splitlines()
    marked = any(line.startswith((" ", ">>>", "..", "--", "==", "~~", "* ", "- ", ":")) for line in lines)
    return not marked and len(paragraph.split()) >= 6 and paragraph.rstrip().endswith((".", "?", "!"))


def write_docstrings(folder: Path) -> None:
    """A parquet file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in docstrings().items():
        rows.to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/docstrings.py FOLDER")
    write_docstrings(Path(sys.argv[1]))
