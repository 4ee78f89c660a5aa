"""What several processes add to the manifold step: the drift check and the gradients' all-reduce.

Compared on factor shapes of real models, interleaved in one run, on processes of one thread each:

- `step`: every process retracts and conditions everything; the optimizer's own work (SGD) is in it;
- `drift check`: one comparison of all factors, which happens every `drift_check_interval` steps;
- `all-reduce`: of the gradients of U, S, V, as DDP does it once a step whatever the manifold step does.

Bytes are those that process 0 wrote to its connections (gloo on Linux). A call takes as long as the slowest process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/distributed_step.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from manifold_step import SHAPES, Case
from manifold_step import Options as StepOptions
from record import environment, markdown, write_record
from torch import distributed as dist
from transformers import HfArgumentParser

IO = Path("/proc/self/io")


@dataclass
class Options:
    """What is measured."""

    models: list[str] = field(default_factory=lambda: ["bert-base", "vit-l"], metadata={"help": ", ".join(SHAPES)})
    rank_ratios: list[float] = field(default_factory=lambda: [0.1, 0.25], metadata={"help": "Rank over min(m, n)."})
    blocks: int = field(default=3, metadata={"help": "Blocks of a model."})
    tau: float = field(default=0.1, metadata={"help": "Conditioning tolerance."})
    rounds: int = field(default=7, metadata={"help": "Interleaved repetitions; the median counts."})
    threads: int = field(default=1, metadata={"help": "Threads of each process."})
    output: str = field(default="outputs/distributed_step.json", metadata={"help": "Where the numbers go."})


class Calls:
    """What is timed, of one model."""

    def __init__(self, name: str, rank_ratio: float, options: Options) -> None:
        torch.manual_seed(0)  # the same factors and gradients on every process
        step = StepOptions(blocks=options.blocks, tau=options.tau)
        self.case = Case(name, rank_ratio, step, torch.device("cpu"))
        self.handle = self.case.handle
        self.handle.drift_check_interval = 0
        self.gradients = torch.cat([g.flatten() for g in self.case.gradients])

    def each(self) -> dict[str, Callable[[], None]]:
        """{name: call}."""
        return {
            "step": self.case.optimizer.step,
            "drift check": self.check,
            "all-reduce": lambda: dist.all_reduce(self.gradients),
        }

    def check(self) -> None:
        self.handle.drift_check_interval = 1
        self.handle._check_drift()
        self.handle.drift_check_interval = 0

    def measured(self, call: Callable[[], None]) -> tuple[float, int]:
        """Seconds of the slowest process, and bytes that this one wrote."""
        self.case.reset()
        self.gradients.normal_()
        dist.barrier()
        written, start = _written(), time.perf_counter()
        call()
        seconds, written = torch.tensor(time.perf_counter() - start, dtype=torch.float64), _written() - written
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item(), written


def _written() -> int:
    """Bytes that this process has written to files and connections."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines()) if IO.exists() else {}
    return int(lines.get("wchar", 0))


def measure(name: str, rank_ratio: float, options: Options) -> dict[str, Any]:
    """Seconds and bytes of every call and round."""
    calls = Calls(name, rank_ratio, options)
    times: dict[str, list[float]] = {call: [] for call in calls.each()}
    written: dict[str, int] = {}
    for turn in range(options.rounds + 1):
        for label, call in calls.each().items():
            seconds, count = calls.measured(call)
            written[label] = count
            if turn:
                times[label].append(seconds)
    factors = sum(p.nbytes for p in calls.case.layers.parameters())
    return {"seconds": times, "bytes_written": written, "bytes_of_factors": factors}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model."""
    lines = []
    for label, result in results.items():
        times, written = result["seconds"], result["bytes_written"]
        cells = [f"{1e3 * statistics.median(times[call]):,.1f}" for call in times]
        sizes = [f"{result['bytes_of_factors'] / 1e6:.1f}"]
        sizes += [f"{written[call] / 1e6:.3f}" for call in ("drift check", "all-reduce")]
        lines.append([label, *cells, *sizes])
    header = ["model", "step, ms", "drift check, ms", "all-reduce, ms"]
    header += ["factors, MB", "sent by the check, MB", "by the all-reduce, MB"]
    return markdown(header, lines)


def main() -> None:
    """Measure, and on process 0 print a table and write all times."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    results = {
        f"{name}, {options.blocks} blocks, rank ratio {ratio:g}": measure(name, ratio, options)
        for name in options.models
        for ratio in options.rank_ratios
    }
    if dist.get_rank() == 0:
        launcher = f"python -m torch.distributed.run --standalone --nproc_per_node {dist.get_world_size()} "
        command = launcher + environment()["command"].removeprefix("python ")
        path = write_record(Path(options.output), {"results": results, "command": command}, options)
        sys.stdout.write(f"{table(results)}\n\nwrote {path}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
