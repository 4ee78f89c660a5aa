"""One training step (forward, backward, AdamW, manifold step): time and peak memory of CondLR and its alternatives.

Compared, interleaved in one run, on models with random weights and random inputs:

- `dense`: the model as it is;
- `low rank`: U, S, V free, what a plain training of the converted model does;
- `LoRA`: PEFT's adapters on the same layers, their weights and everything but the head frozen;
- `CondLR`: `attach_manifold_step`, the bound reached in the first step and every core pressed against it;
- `CondLR, k = 4`: the same with `projection_interval=4`, where `--intervals` asks for it.

Peak memory is that of the second step of a method alone in a process of its own: on CUDA `max_memory_allocated`; on
Linux the largest resident memory (VmHWM) less what was resident before the model was built, with an allocator that
gives back what is freed, so that its fragments do not count.

    python -m benchmarks.training_step --models minilm
    python -m benchmarks.training_step --models vit-b16 --batch_size 128 --dtype bfloat16 --intervals 1 4
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import set_seed

from benchmarks.memory import GIVING_BACK, peak_of, resident
from benchmarks.models import CONFIGS, DTYPES, HEADS, autocast, batch_for, build, factor, linear_names, tokens_of
from benchmarks.timing import CommonOptions, interleaved, ratios, run, spread
from hf_condlr import attach_manifold_step
from hf_condlr.config import Start
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device, set_up

METHODS = ["dense", "low rank", "LoRA"]
CONDLR = "CondLR"
LORA_RANK = 16


@dataclass
class Options(CommonOptions):
    """What is measured."""

    models: list[str] = option(["minilm"], ", ".join(CONFIGS))
    batch_size: int | None = option(None, "Samples; by default as many as give 4,096 tokens.")
    tokens: int = option(128, "Tokens of a text.")
    dtype: str = option("float32", f"{', '.join(DTYPES)} (autocast).")
    compression_ratio: float = option(0.6, "Share of the linear layers' weights removed.")
    rank_multiple: int = option(1, "Ranks are rounded down to multiples of it.")
    init_weights: Start = option("svd", "Start of the factors; 'orthogonal' decomposes nothing.")
    intervals: list[int] = option([1], "CondLR with these values of projection_interval.")
    memory: bool = option(True, "Measure peak memory, a process for each method.")

    @property
    def methods(self) -> dict[str, int]:
        """{method: steps from one projection to the next; 0 without}."""
        condlr = {f"{CONDLR}, k = {k}" if k > 1 else CONDLR: k for k in self.intervals}
        return dict.fromkeys(METHODS, 0) | condlr


class Step:
    """A model with its optimizer and one batch."""

    def __init__(self, method: str, name: str, options: Any, device: torch.device) -> None:
        set_seed(0)
        self.interval = options.methods[method]
        with torch.device(device):  # where large matrices are decomposed faster
            model: Any = build(name)
        if method == "low rank" or self.interval:
            model = factor(model, options.compression_ratio, options.rank_multiple, options.init_weights)
        per_sample = tokens_of(model, options.tokens)
        samples = options.batch_size or -(-4096 // per_sample)
        self.tokens = samples * per_sample
        self.batch = batch_for(model, samples, options.tokens, device)
        self.batch["labels"] = torch.arange(samples, device=device) % 2
        if method == "LoRA":
            model = inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=linear_names(model)), model)
            model.get_submodule(HEADS[type(model)]).requires_grad_(True)
        self.model = model.to(device).train()
        self.device, self.dtype = device, options.dtype
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # the Trainer's default
        if self.interval:
            attach_manifold_step(self.optimizer, self.model, projection_interval=self.interval)

    def loss(self) -> torch.Tensor:
        """Forward."""
        with autocast(self.dtype, self.device):
            return self.model(**self.batch).loss

    def __call__(self) -> None:
        """One training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def repeated(step: Step, count: int) -> None:
    """Several training steps."""
    for _ in range(count):
        step()


def peak_memory(method: str, name: str, options: Options) -> int | None:
    """Bytes at the peak of a step, to be called in a process of its own; None where it cannot be measured."""
    set_up(options.threads)
    device = any_device()
    before = 0 if device.type == "cuda" else resident()
    step = Step(method, name, options, device)
    step()  # the optimizer's moments are made in it
    peak = peak_of(step, device)  # without that of the conversion
    return None if peak is None else peak - before


def measure(options: Options) -> Iterator[dict[str, dict[str, Any]]]:
    """Seconds of every round and method, then also peak memory, of more and more models."""
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    for name in options.models:
        memory: dict[str, int | None] = dict.fromkeys(options.methods)
        steps = {method: Step(method, name, options, any_device()) for method in options.methods}
        repeats = max(options.intervals)  # so that each method takes as many steps, and k = 4 projects once
        calls = {method: partial(repeated, step, repeats) for method, step in steps.items()}
        times = interleaved(calls, options.rounds, any_device())
        seconds = {method: [value / repeats for value in values] for method, values in times.items()}
        results[name] = {"tokens": steps["dense"].tokens, "seconds": seconds, "peak_bytes": memory}
        yield results
        del steps, calls
        torch.cuda.empty_cache()  # for the processes that follow; does nothing without CUDA
        for method in options.methods if options.memory else ():
            with GIVING_BACK, ProcessPoolExecutor(1, mp_context=spawn) as process:
                memory[method] = process.submit(peak_memory, method, name, options).result()
        yield results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model and method."""
    lines = []
    for name, result in results.items():
        times, memory = result["seconds"], result["peak_bytes"]
        for method, peak in memory.items():
            shown = "not measured" if peak is None else f"{peak / 1e6:,.0f} ({peak / memory['dense']:.2f})"
            cells = [f"{1e3 * statistics.median(times[method]):,.1f}"]
            cells += [spread(ratios(times[method], times[base])) for base in ("low rank", "dense")]
            lines.append([f"{name}, {result['tokens']:,} tokens", method, *cells, shown])
    return markdown_table(["model", "method", "ms a step", "over low rank", "over dense", "peak MB (of dense)"], lines)


if __name__ == "__main__":
    run(Options, measure, table)
