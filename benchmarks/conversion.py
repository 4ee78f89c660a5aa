"""What a conversion costs: processor time and peak memory of each start, beside the operations by formula.

A layer (m, n), k = min(m, n), with T tokens of calibration data takes in float32

    forward 2 m n T, backward 2 m n T, C (n² + 192 n) T once for each distinct input, F (m² + 192 m) T,

the second and the last for `fisher` only; and in float64, with rank r,

    decomposition 2 m n (m + n) + 14 k³,  factors 2 m² r + 4 m n r + 6 (m + n) r² + 20 r³,  report 4 m n².

Each start runs in a process of its own, on noise: what it costs hardly depends on the values (the sweeps of
`conditioned_start` do). Names are those of `benchmarks.models`, or folders of pretrained models.

    python -m benchmarks.conversion --models FOLDER
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from benchmarks.memory import GIVING_BACK, peak_of
from benchmarks.models import CONFIGS, batch_for, build
from benchmarks.timing import CommonOptions, run
from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device, set_up

STARTS: dict[str, dict[str, Any]] = {
    "svd": {},
    "activation_aware": {"init_weights": "activation_aware"},
    "fisher": {"init_weights": "fisher", "rank_allocation": "fisher"},
    "fisher, conditioned": {"init_weights": "fisher", "rank_allocation": "fisher", "conditioned_start": True, "tau": 4},
}
LLAMAS = {  # hidden size, rows of k and v, size of the MLP, blocks
    "1B": (2048, 512, 8192, 16),
    "7B": (4096, 4096, 11008, 32),
    "70B": (8192, 1024, 28672, 80),
}


@dataclass
class Options(CommonOptions):
    """What is varied."""

    models: list[str] = option(["minilm"], "Names of benchmarks.models, or folders of models.")
    starts: list[str] = option(list(STARTS), "Keys of STARTS.")
    compression_ratio: float = option(0.6, "Share of the layers' weights removed.")
    samples: int = option(256, "Of calibration.")
    batch_size: int = option(32, "Of calibration.")
    tokens: int = option(64, "Of a text.")
    pixels: int = option(70, "Of the side of a picture.")
    llamas: list[str] = option([], "Print the formula for these of LLAMAS instead.")


def model_of(name: str) -> Any:
    """A model with random weights, or a pretrained one."""
    if name in CONFIGS:
        return build(name).eval()
    config = AutoConfig.from_pretrained(name)
    model_class: Any = AutoModelForSequenceClassification
    if config.architectures[0].endswith("ForCausalLM"):
        model_class = AutoModelForCausalLM
    elif hasattr(config, "patch_size"):
        model_class = AutoModelForImageClassification
    return model_class.from_pretrained(name, dtype=torch.float32).eval()


def batches(model: Any, options: Options, device: torch.device) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Noise, and the number of tokens in it."""
    count = options.samples // options.batch_size
    if model.main_input_name == "pixel_values":
        per_sample = (options.pixels // model.config.patch_size) ** 2 + 1
        shape = (options.batch_size, 3, options.pixels, options.pixels)
        data = [{"pixel_values": torch.randn(shape, device=device)} for _ in range(count)]
    else:
        per_sample = options.tokens
        data = [batch_for(model, options.batch_size, per_sample, device) for _ in range(count)]
    return data, count * options.batch_size * per_sample


class Passes:
    """Batches that add up the processor time from the first to the end of the last."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.seconds, self.count = batches, 0.0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start = time.process_time()
        yield from self.batches
        self.seconds, self.count = self.seconds + time.process_time() - start, self.count + 1


def convert(name: str, start: str, options: Options) -> dict[str, Any]:
    """Seconds and bytes of one conversion, to be called in a process of its own."""
    set_up(options.threads)
    torch.manual_seed(0)
    device = any_device()
    model = model_of(name).to(device)
    data, tokens = batches(model, options, device)
    passes = Passes(data)
    config = CondLRConfig(compression_ratio=options.compression_ratio, **STARTS[start])
    result: dict[str, Any] = {"model_bytes": sum(p.nbytes for p in model.parameters())}

    def call() -> None:
        get_robust_lowrank_model(model, config, calibration_data=passes if config.needs_calibration_data else None)

    began, wall = time.process_time(), time.perf_counter()
    result["peak_bytes"] = peak_of(call, device)
    result |= {"seconds": time.process_time() - began, "wall": time.perf_counter() - wall}
    result |= {"in_passes": passes.seconds, "passes": passes.count}
    layers = model.condlr.report.converted.values()
    result["operations"] = operations([(*x.shape, x.r) for x in layers], tokens, gradients="fisher" in start)
    return result


def operations(layers: Iterable[tuple[int, int, int]], tokens: int, *, gradients: bool) -> dict[str, float]:
    """The formula above summed over layers (m, n, r), each with an input of its own."""
    passes = exact = 0.0
    for m, n, r in layers:
        k = min(m, n)
        passes += tokens * (2 * m * n + n * n + 192 * n + (2 * m * n + m * m + 192 * m if gradients else 0))
        exact += 2 * m * n * (m + n) + 14 * k**3 + 4 * m * n * n
        exact += 2 * m * m * r + 4 * m * n * r + 6 * (m + n) * r * r + 20 * r**3
    return {"float32": passes, "float64": exact}


def llama_layers(name: str, ratio: float) -> list[tuple[int, int, int]]:
    """(m, n, r) of every layer, at the same share of the weights removed."""
    d, kv, f, blocks = LLAMAS[name]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)] * blocks
    return [(m, n, int((((m + n) ** 2 + 4 * (1 - ratio) * m * n) ** 0.5 - m - n) / 2)) for m, n in shapes]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Results of more and more models and starts; or the formula."""
    if options.llamas:
        tokens = options.samples * options.tokens
        found = {}
        for name in options.llamas:
            layers = llama_layers(name, options.compression_ratio)
            held = 4 * sum((n * n + m * m) / 2 for m, n, _ in layers)
            weights = sum(m * n for m, n, _ in layers)
            for start, gradients in (("activation_aware", False), ("fisher", True)):
                found[f"{name}, {start}"] = operations(layers, tokens, gradients=gradients) | {
                    "weights": weights,
                    "bytes": held if gradients else 4 * sum(n * n / 2 for _, n, _ in layers),
                }
        yield {"formula": found}
        return
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {}
    for name in options.models:
        for start in options.starts:
            with GIVING_BACK, ProcessPoolExecutor(1, mp_context=spawn) as process:
                found = process.submit(convert, name, start, options).result()
            results[f"{Path(name).name}, {start}"] = found
            yield results


def table(results: dict[str, Any]) -> str:
    """A line for each model and start."""
    if "formula" in results:
        header = ["model, start", "10⁹ weights", "float32 10¹⁵ operations", "float64 10¹⁵", "C and F, GB"]
        keys = (("weights", 1e9), ("float32", 1e15), ("float64", 1e15), ("bytes", 1e9))
        lines = [[name, *(f"{x[key] / unit:.3g}" for key, unit in keys)] for name, x in results["formula"].items()]
        return markdown_table(header, lines)
    header = ["model, start", "s", "in passes", "10⁹/s there", "10⁹/s after", "peak MB", "of the model"]
    lines = []
    for name, x in results.items():
        after, peak = x["seconds"] - x["in_passes"], x["peak_bytes"]
        rates = [
            f"{x['operations'][kind] / seconds / 1e9:.0f}" if x["passes"] else ""
            for kind, seconds in (("float32", x["in_passes"] or 1), ("float64", after))
        ]
        shown = ["not measured", ""] if peak is None else [f"{peak / 1e6:,.0f}", f"{peak / x['model_bytes']:.2f}"]
        lines.append([name, f"{x['seconds']:.1f}", f"{x['in_passes']:.1f}", *rates, *shown])
    return markdown_table(header, lines)


if __name__ == "__main__":
    run(Options, measure, table)
