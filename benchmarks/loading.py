"""What the package costs before anything is computed: its import, and loading a factored checkpoint beside a dense one.

- `import`: seconds of `import hf_condlr` after `import torch, transformers`, in a fresh process;
- `first load`: seconds of the first `from_pretrained` of a fresh process, which imports most of transformers;
- `load`: of later ones, dense and factored in turn. safetensors maps a file into memory and reads it when it is first
  used, so a dense load that is never used is nearly free; `load and read` sums every parameter once, too.

All of processor time, which includes checksums and the verification of every layer.

    python -m benchmarks.loading
    python -m benchmarks.loading --model tiny --rounds 1
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from benchmarks.models import CONFIGS, build, linear_names
from benchmarks.timing import CommonOptions, interleaved, ratios, run, spread
from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.options import option
from hf_condlr.tables import markdown_table

FRESH = """
import json, sys, time
import torch, transformers
torch.set_num_threads(int(sys.argv[3]))
times = [time.process_time()]
import hf_condlr
times.append(time.process_time())
getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2])
times.append(time.process_time())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


@dataclass
class Options(CommonOptions):
    """What is measured."""

    model: str = option("vit-b16", ", ".join(CONFIGS))
    compression_ratio: float = option(0.6, "Share of the linear layers' weights removed.")


def auto_class(model: Any) -> Any:
    """The class of transformers that loads the model."""
    images = model.main_input_name == "pixel_values"
    return AutoModelForImageClassification if images else AutoModelForSequenceClassification


def fresh(loader: str, folder: Path, threads: int) -> list[float]:
    """Seconds of the import and of the first load, in a process of its own."""
    command = [sys.executable, "-c", FRESH, loader, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read(model: Any) -> None:
    """Use every weight once."""
    for parameter in model.parameters():
        parameter.detach().sum()


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Seconds of imports and loads, {what: {"dense" or "factored": seconds}}."""
    model = build(options.model)
    loader = auto_class(model)
    with tempfile.TemporaryDirectory() as name:
        folders = {form: Path(name, form) for form in ("dense", "factored")}
        model.save_pretrained(folders["dense"])
        config = CondLRConfig(
            target_modules=linear_names(model), compression_ratio=options.compression_ratio, init_weights="orthogonal"
        )
        get_robust_lowrank_model(model, config).save_pretrained(folders["factored"])
        in_fresh = {
            form: [fresh(loader.__name__, folder, options.threads) for _ in range(options.rounds)]
            for form, folder in folders.items()
        }
        device, load = torch.device("cpu"), loader.from_pretrained
        loads: dict[str, Callable[[], Any]] = {form: lambda f=folder: load(f) for form, folder in folders.items()}
        uses: dict[str, Callable[[], Any]] = {form: lambda f=folder: read(load(f)) for form, folder in folders.items()}
        yield {
            "import": {"package": [times[0] for of_form in in_fresh.values() for times in of_form]},
            "first load": {form: [times[1] for times in of_form] for form, of_form in in_fresh.items()},
            "load": interleaved(loads, options.rounds, device),
            "load and read": interleaved(uses, options.rounds, device),
        }


def table(results: dict[str, Any]) -> str:
    """Milliseconds, and each factored load over the dense one beside it."""
    lines = [["import hf_condlr", "", spread([1e3 * s for s in results["import"]["package"]], 1), ""]]
    for what in ("first load", "load", "load and read"):
        times = results[what]
        cells = [f"{1e3 * statistics.median(times[form]):,.0f}" for form in ("dense", "factored")]
        lines.append([what, *cells, spread(ratios(times["factored"], times["dense"]))])
    return markdown_table(["", "dense, ms", "factored, ms", "factored over dense"], lines)


if __name__ == "__main__":
    run(Options, measure, table)
