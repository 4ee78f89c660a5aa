"""One training step (forward, backward, AdamW, manifold step): time and peak memory of CondLR beside its rivals.

Compared, interleaved in one run, on models with random weights and random inputs:

- `dense`: the model as it is;
- `low rank`: U, S, V free, what a plain training of the converted model does;
- `LoRA`: PEFT's adapters on the same layers, their weights and everything but the head frozen;
- `CondLR`: `attach_manifold_step`, the bound reached in the first step and every core pressed against it.

Peak memory is that of the second step of a method alone in a process of its own: on CUDA `max_memory_allocated`; on
Linux the largest resident memory (VmHWM) less what was resident before the model was built, with an allocator that
gives back what is freed, so that its fragments do not count.

    python benchmarks/training_step.py --models minilm
    python benchmarks/training_step.py --models vit-b16 --batch_size 128 --dtype bfloat16
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, inject_adapter_in_model
from record import markdown, write_record
from speed_parts import (
    CONFIGS,
    DTYPES,
    any_device,
    autocast,
    batch_for,
    build,
    factor,
    interleaved,
    linear_names,
    ratios,
    spread,
    tokens_of,
)
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from hf_condlr import attach_manifold_step

METHODS = ["dense", "low rank", "LoRA", "CondLR"]
PROC = Path("/proc/self")
# glibc maps arrays from this size on by themselves, and unmaps them when they are freed; read when a process starts.
GIVING_BACK = mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")


@dataclass
class Options:
    """What is measured."""

    models: list[str] = field(default_factory=lambda: ["minilm"], metadata={"help": ", ".join(CONFIGS)})
    batch_size: int | None = field(default=None, metadata={"help": "Samples; by default as many as give 4,096 tokens."})
    tokens: int = field(default=128, metadata={"help": "Tokens of a text."})
    dtype: str = field(default="float32", metadata={"help": f"{', '.join(DTYPES)} (autocast)."})
    compression_ratio: float = field(default=0.6, metadata={"help": "Share of the linear layers' weights removed."})
    projection_interval: int = field(default=1, metadata={"help": "k of CondLR; a round then has k steps."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA."})
    rank_multiple: int = field(default=1, metadata={"help": "Ranks are rounded down to multiples of it."})
    rounds: int = field(default=5, metadata={"help": "Interleaved repetitions; the median of the ratios counts."})
    memory: bool = field(default=True, metadata={"help": "Measure peak memory, a process for each method."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output: str = field(default="outputs/training_step.json", metadata={"help": "Where the record goes."})


class Step:
    """A model with its optimizer and one batch."""

    def __init__(self, method: str, name: str, options: Options, device: torch.device) -> None:
        set_seed(0)
        model: Any = build(name)
        if method in ("low rank", "CondLR"):
            model = factor(model, options.compression_ratio, options.rank_multiple)
        per_sample = tokens_of(model, options.tokens)
        samples = options.batch_size or -(-4096 // per_sample)
        self.tokens = samples * per_sample
        self.batch = batch_for(model, samples, options.tokens, device)
        self.batch["labels"] = torch.arange(samples, device=device) % 2
        if method == "LoRA":
            config = LoraConfig(r=options.lora_rank, target_modules=linear_names(model))
            model = inject_adapter_in_model(config, model)
            model.classifier.requires_grad_(True)
        self.model = model.to(device).train()
        self.device, self.dtype = device, options.dtype
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # the Trainer's default
        if method == "CondLR":
            attach_manifold_step(self.optimizer, self.model, projection_interval=options.projection_interval)

    def loss(self) -> torch.Tensor:
        """Forward."""
        with autocast(self.dtype, self.device):
            return self.model(**self.batch).loss

    def __call__(self) -> None:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_memory(method: str, name: str, options: Options) -> int | None:
    """Bytes at the peak of a step, to be called in a process of its own; None where nothing tells."""
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    device = any_device()
    on_linux = (PROC / "clear_refs").exists()
    before = _resident("VmRSS") if on_linux else 0
    step = Step(method, name, options, device)
    step()  # the optimizer's moments are made in it
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif on_linux:
        (PROC / "clear_refs").write_text("5")  # forgets the peak of the conversion
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before if on_linux else None


def _resident(key: str) -> int:
    """VmRSS or VmHWM in bytes: `getrusage` would start from the parent's peak."""
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(name: str, options: Options) -> dict[str, Any]:
    """Peak memory of every method, then seconds of every method and round."""
    spawn = multiprocessing.get_context("spawn")
    memory: dict[str, int | None] = dict.fromkeys(METHODS)
    for method in METHODS if options.memory else ():
        with GIVING_BACK, ProcessPoolExecutor(1, mp_context=spawn) as process:
            memory[method] = process.submit(peak_memory, method, name, options).result()
    device = any_device()
    steps = {method: Step(method, name, options, device) for method in METHODS}

    def several(step: Step) -> None:
        for _ in range(options.projection_interval):
            step()

    times = interleaved({m: partial(several, s) for m, s in steps.items()}, options.rounds, device)
    per_step = {m: [t / options.projection_interval for t in values] for m, values in times.items()}
    return {"tokens": steps["dense"].tokens, "seconds": per_step, "peak_bytes": memory}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model and method."""
    lines = []
    for name, result in results.items():
        times, memory = result["seconds"], result["peak_bytes"]
        for method in METHODS:
            peak = memory[method]
            shown = "not measured" if peak is None else f"{peak / 1e6:,.0f} ({peak / memory['dense']:.2f})"
            cells = [f"{1e3 * statistics.median(times[method]):,.0f}"]
            cells += [spread(ratios(times[method], times[base])) for base in ("low rank", "dense")]
            lines.append([f"{name}, {result['tokens']:,} tokens", method, *cells, shown])
    header = ["model", "method", "ms a step", "over low rank", "over dense", "peak MB (of dense)"]
    return markdown(header, lines)


def main() -> None:
    """Measure, print a table, write all times."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    results = {name: measure(name, options) for name in options.models}
    path = write_record(Path(options.output), {"results": results}, options)
    sys.stdout.write(f"{table(results)}\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
