"""Texts that a machine with Python and this package's environment has: four kinds to calibrate on, four held out.

Calibration: docstrings, reviews (SST-2), Python's help. Held out: docstrings of other packages and other reviews, and
two kinds that calibration has nothing of, licences and Python source.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import torch
from torch import Tensor

from studies.data import data_folder

PACKAGES = Path(sysconfig.get_paths()["purelib"])
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LENGTH = 256
LONGEST = 1024
"""Tokens that are taken of one text at most."""
AT_A_TIME = 32
"""Texts that a model writes at a time: its cache takes 12 MB a text of SmolLM2-135M."""


def calibration_blocks(tokenizer: Any, count: int, data_dir: str | None = None) -> Tensor:  # (count, LENGTH)
    """Blocks of tokens, a third of each kind."""
    kinds = [docstrings("numpy", "pandas", "transformers", "sklearn"), reviews("train", data_dir), topics.values()]
    return torch.cat([blocks(texts, tokenizer, count // len(kinds)) for texts in kinds])


def held_out_blocks(
    tokenizer: Any, count: int, data_dir: str | None = None
) -> dict[str, Tensor]:  # {kind: (count, LENGTH)}
    """Blocks of each kind of text."""
    kinds = {
        "docstrings": docstrings("scipy", "networkx", "matplotlib", "sympy"),
        "reviews": reviews("test", data_dir),
        "licences": licences(),
        "source": [path.read_text(encoding="utf-8", errors="ignore") for path in STANDARD_LIBRARY.glob("*.py")],
    }
    return {kind: blocks(texts, tokenizer, count) for kind, texts in kinds.items()}


def written_blocks(model: Any, tokenizer: Any, count: int) -> Tensor:  # (count, LENGTH)
    """Blocks that a model writes itself, as LLM-QAT does it (Liu et al. 2023, arXiv 2305.17888).

    The first token is any of the vocabulary, the others are drawn from the model's predictions, with a fixed seed.
    """
    torch.manual_seed(0)
    first = torch.randint(len(tokenizer), (count, 1))
    length = {"min_length": LENGTH, "max_length": LENGTH, "pad_token_id": tokenizer.eos_token_id}
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return torch.cat(
        [model.generate(ids, attention_mask=torch.ones_like(ids), **length, **drawn) for ids in first.split(AT_A_TIME)]
    )


def blocks(texts: Iterable[str], tokenizer: Any, count: int) -> Tensor:  # (count, LENGTH)
    """Distinct texts in a fixed random order, one after the other, cut into blocks."""
    ordered = sorted(set(texts))
    random.Random(0).shuffle(ordered)
    tokens: list[int] = []
    for text in ordered:
        tokens += [*tokenizer(text)["input_ids"][:LONGEST], tokenizer.eos_token_id]
        if len(tokens) >= count * LENGTH:
            return torch.tensor(tokens[: count * LENGTH], dtype=torch.long).view(count, LENGTH)
    raise ValueError(f"texts must have {count * LENGTH} tokens; received {len(tokens)}. Ask for fewer blocks.")


def docstrings(*packages: str) -> list[str]:
    """Up to 400 docstrings of 300 characters or more of each package that is installed, tests left out."""
    return [text for package in packages for text in islice(_docstrings(PACKAGES / package), 400)]


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if "test" in str(path.relative_to(folder)):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if len(text) > 300:
                    yield text


def reviews(split: str, data_dir: str | None = None) -> list[str]:
    """Sentences of SST-2."""
    rows = datasets.load_dataset("parquet", data_files=str(Path(data_folder("sst2", data_dir), f"{split}.parquet")))[
        "train"
    ]
    return list(rows["sentence"])


def licences() -> list[str]:
    """The first 4,000 characters of the licences and descriptions of the installed packages."""
    found: list[str] = []
    for path in sorted(PACKAGES.glob("*.dist-info/**/*")):
        if path.is_file() and (path.name == "METADATA" or "LICENSE" in path.name.upper()):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found.append((text.partition("\n\n")[2] if path.name == "METADATA" else text)[:4000])
    return [text for text in found if len(text) > 600]
