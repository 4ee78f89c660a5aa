"""Where the time of one training step under CondLR goes: forward, backward, optimizer, parts of the manifold step.

Taken with `torch.profiler` from ranges of `record_function`; on CUDA each range waits for the device at both ends, so
that its time is the device's too. The manifold step is what runs between two hooks around its own, and within it every
function of `hf_condlr.linalg` whose name begins as one of `PARTS` is a range: projection, Cholesky retraction,
conditioning. The rest of it is copies (the operators of `COPIES`) and all else: checks for finite values, and Python.

The floor is the bare matrix products: two projections, a Gram matrix and the product with its inverse factor for each U
and V, one factor after the other, after each step. Times are means over all steps, and shares those of the sums: on a
shared machine the median of a short range is one that nobody interrupted, that of a long one is not.

    python benchmarks/profile_step.py --model minilm
    python benchmarks/profile_step.py --model vit-b16 --batch_size 128 --dtype bfloat16
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import markdown, write_record
from speed_parts import CONFIGS, any_device
from torch.profiler import ProfilerActivity, profile, record_function
from training_step import Options as StepOptions
from training_step import Step
from transformers import HfArgumentParser
from transformers.utils import logging

import hf_condlr.linalg
from hf_condlr import LowRankLinear, attach_manifold_step

PARTS = {"project": "projection", "retract_cholesky": "Cholesky retraction", "clamp": "conditioning"}
MANIFOLD = "manifold step"
FLOOR = "floor: the bare products"
COPIES = {"aten::stack", "aten::cat", "aten::copy_", "aten::_foreach_copy_", "aten::clone", "aten::_to_copy"}


@dataclass
class Options:
    """What is measured."""

    model: str = field(default="minilm", metadata={"help": ", ".join(CONFIGS)})
    batch_size: int | None = field(default=None, metadata={"help": "Samples; by default as many as give 4,096 tokens."})
    tokens: int = field(default=128, metadata={"help": "Tokens of a text."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 (autocast)."})
    compression_ratio: float = field(default=0.6, metadata={"help": "Share of the linear layers' weights removed."})
    rank_multiple: int = field(default=1, metadata={"help": "Ranks are rounded down to multiples of it."})
    steps: int = field(default=5, metadata={"help": "Profiled, after two that warm up."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output: str = field(default="outputs/profile_step.json", metadata={"help": "Where the record goes."})


@contextmanager
def named(name: str, device: torch.device) -> Iterator[None]:
    """A range of the profile, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    with record_function(name):
        yield
        wait()


@contextmanager
def linalg_ranges(device: torch.device) -> Iterator[None]:
    """What `PARTS` names is a range: functions of hf_condlr.linalg, wherever imported."""

    def as_range(function: Callable, part: str) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with named(part, device):
                return function(*args, **kwargs)

        return call

    functions = {f: p for n, f in vars(hf_condlr.linalg).items() for key, p in PARTS.items() if n.startswith(key)}
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_condlr.")]
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                # Not in linalg itself, whose functions call one another: a range would be in a range.
                if module is not hf_condlr.linalg and callable(value) and value in functions:
                    stack.enter_context(mock.patch.object(module, name, as_range(value, functions[value])))
        yield


def attach_in_ranges(step: Step, device: torch.device) -> None:
    """The manifold step, between hooks that open and close a range: torch runs hooks in the order of registration."""
    open_ranges = ExitStack()

    def enter(*_: Any) -> None:
        open_ranges.enter_context(named(MANIFOLD, device))

    def leave(*_: Any) -> None:
        open_ranges.close()

    step.optimizer.register_step_pre_hook(enter)
    step.optimizer.register_step_post_hook(enter)
    attach_manifold_step(step.optimizer, step.model)
    step.optimizer.register_step_pre_hook(leave)
    step.optimizer.register_step_post_hook(leave)


def profiled(step: Step, device: torch.device) -> dict[str, float]:
    """{part: seconds} of one training step."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as run:
        with named("forward", device):
            loss = step.loss()
        with named("backward", device):
            loss.backward()
        with named("step", device):
            step.optimizer.step()
        step.optimizer.zero_grad()
        with named(FLOOR, device):
            bare_products(step.model)
    totals = dict.fromkeys(("forward", "backward", "step", MANIFOLD, *PARTS.values(), "copies", FLOOR), 0.0)
    for event in run.events():
        if event.device_type.name != "CPU":
            continue  # a range appears once more as the device's
        if event.name in totals:
            totals[event.name] += event.cpu_time_total / 1e6
        elif event.name in COPIES and MANIFOLD in _ranges_around(event):
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            totals["copies"] += own / 1e6
    inside = sum(totals[part] for part in (*PARTS.values(), "copies"))
    return {
        "forward": totals["forward"],
        "backward": totals["backward"],
        "optimizer": totals["step"] - totals[MANIFOLD],
        MANIFOLD: totals[MANIFOLD],
        **{part: totals[part] for part in (*PARTS.values(), "copies")},
        "checks and Python": totals[MANIFOLD] - inside,
        FLOOR: totals[FLOOR],
    }


def _ranges_around(event: Any) -> set[str]:
    """Names of the events that `event` lies in; none where a part of the manifold step counts it already."""
    names = set()
    while (event := event.cpu_parent) is not None:
        names.add(event.name)
    return set() if names & set(PARTS.values()) else names


@torch.no_grad()
def bare_products(model: torch.nn.Module) -> None:
    """The matrix products of the step, 12(m + n)r² operations a layer."""
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            for U in (layer.U, layer.V):
                for _ in range(3):  # the projections of gradient and displacement; the Gram matrix and X L⁻ᵀ
                    U @ (U.mT @ U)


def table(results: list[dict[str, float]]) -> str:
    """Milliseconds and shares of the training step and of the manifold step."""
    means = {part: sum(result[part] for result in results) / len(results) for part in results[0]}
    total = sum(means[part] for part in ("forward", "backward", "optimizer", MANIFOLD))
    lines = []
    for part, mean in means.items():
        own = part not in ("forward", "backward", "optimizer")
        label = f"– {part}" if own and part != MANIFOLD else part
        share = f"{mean / means[MANIFOLD]:.0%}" if own else ""
        lines.append([label, f"{1e3 * mean:,.1f}", f"{mean / total:.1%}", share])
    return markdown(["part", "ms", "of the training step", "of the manifold step"], lines)


def main() -> None:
    """Profile, print a table, write all times."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    device = any_device()
    settings = StepOptions(
        batch_size=options.batch_size,
        tokens=options.tokens,
        dtype=options.dtype,
        compression_ratio=options.compression_ratio,
        rank_multiple=options.rank_multiple,
    )
    step = Step("low rank", options.model, settings, device)
    results = []
    with linalg_ranges(device):
        attach_in_ranges(step, device)
        for turn in range(options.steps + 2):
            parts = profiled(step, device)
            if turn >= 2:
                results.append(parts)
    path = write_record(Path(options.output), {"tokens": step.tokens, "seconds": results}, options)
    title = f"{options.model}, {step.tokens:,} tokens, {options.dtype}, {device.type}"
    sys.stdout.write(f"{title}\n\n{table(results)}\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
