"""What the benchmarks write alike: the record of how numbers were made, and their tables."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

import hf_condlr


def environment(*options: Any) -> dict[str, Any]:
    """Command, versions, kind of machine, and the fields of the dataclasses `options`."""
    modules = {"hf_condlr": hf_condlr, "torch": torch, "transformers": transformers, "datasets": datasets}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{n: m.__version__ for n, m in modules.items()}},
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads{gpu}",
        "options": {name: value for part in options for name, value in asdict(part).items()},
    }


def write_record(path: Path, results: dict[str, Any], *options: Any) -> Path:
    """The results and how they were made, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment(*options) | results, indent=1, allow_nan=False) + "\n")
    return path


def digest(key: dict[str, Any]) -> str:
    """Of settings, for a file's name."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.{digits}f}{spread}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def method_label(method: str) -> str:
    """`tau=0.1` as it is printed."""
    return method.replace("tau=", "CondLR τ = ")


def sweep_table(rows: list[dict[str, Any]], rates: list[float]) -> str:
    """Validation accuracy of each method at each learning rate, in %."""
    lines = []
    for method in dict.fromkeys(row["key"]["method"] for row in rows):
        found = {row["key"]["learning_rate"]: row for row in rows if row["key"]["method"] == method}
        cells = [
            "diverged" if found[rate]["diverged"] else f"{100 * found[rate]['validation_accuracy']:.2f}"
            for rate in rates
        ]
        lines.append([method_label(method), *cells])
    return markdown(["method", *(f"{rate:g}" for rate in rates)], lines)
