"""What studies and benchmarks share: options, the record of how numbers were made, and how numbers are written."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

import hf_condlr
from hf_condlr.files import replacing

logger = logging.getLogger("studies")
PACKAGES = ("hf_condlr", "torch", "transformers", "datasets")


def parse(*dataclasses: type) -> tuple[Any, ...]:
    """An instance of each dataclass, from the command line; a mistake ends the program with one line."""
    parser = HfArgumentParser(dataclasses, allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses()
    except ValueError as error:  # the library's errors about arguments are ValueErrors too
        parser.error(str(error))


def set_up(threads: int | None) -> None:
    """Number of torch's threads (None: torch's choice), the study's progress on stderr, no progress bars."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def any_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(*options: Any) -> dict[str, Any]:
    """Command, versions, kind of machine, and the fields of the dataclasses `options`."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads{gpu}",
        "options": {name: value for part in options for name, value in asdict(part).items()},
    }


def version_of(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return hf_condlr.__version__ if package == "hf_condlr" else version(package)
    except PackageNotFoundError:
        return None


def write_record(path: str | Path, results: dict[str, Any], *options: Any) -> Path:
    """Write the results and how they were made as JSON; returns the path."""
    write_json(Path(path), environment(*options) | results)
    return Path(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write strict JSON in one step: a killed program leaves no half of a file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.{digits}f}{spread}"
