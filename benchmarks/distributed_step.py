"""What several processes add to the manifold step: the drift check, and the gradients' all-reduce.

Compared on factor shapes of real models, interleaved in one run, on processes of one thread each:

- `step`: every process retracts and conditions everything; the optimizer's own work (SGD) is in it;
- `step and drift check`: with one comparison of all factors, which happens every `drift_check_interval` steps;
- `all-reduce`: of the gradients of U, S, V, as DDP does it once a step whatever the manifold step does.

Bytes are those that process 0 wrote to its connections (gloo on Linux). A call takes as long as the slowest process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 --module benchmarks.distributed_step
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from benchmarks import manifold_step
from benchmarks.timing import in_turn
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import environment, parse, set_up, write_record

IO = Path("/proc/self/io")
STEP, CHECKED, REDUCE = "step", "step and drift check", "all-reduce"


@dataclass
class Options(manifold_step.Options):
    """What is measured."""

    models: list[str] = option(["bert-base", "vit-l"], ", ".join(manifold_step.SHAPES))
    rank_ratios: list[float] = option([0.1, 0.25], "Rank over min(m, n).")
    blocks: int = option(3, "Blocks of a model.")
    threads: int = option(1, "Threads of each process.")
    output: str = option("outputs/distributed_step.json", "Where the record goes.")


def written() -> int:
    """Bytes that this process has written to files and connections."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines()) if IO.exists() else {}
    return int(lines.get("wchar", 0))


def measure(name: str, rank_ratio: float, options: Options) -> dict[str, Any]:
    """Seconds of the slowest process, of every call and round, and the bytes that this one wrote in the last round."""
    torch.manual_seed(0)  # the same factors and gradients on every process
    shapes = manifold_step.shapes_of(name, rank_ratio, options.blocks)
    case = manifold_step.Case(shapes, options.tau, torch.device("cpu"))
    gradients = torch.cat([g.flatten() for g in case.gradients])
    sent: dict[str, int] = {}

    def step(interval: int) -> None:
        case.handle.drift_check_interval = interval
        case.optimizer.step()

    def timed(label: str, call: Callable[[], Any]) -> float:
        case.give_gradients()
        gradients.normal_()
        dist.barrier()
        before, start = written(), time.perf_counter()
        call()
        seconds, sent[label] = torch.tensor(time.perf_counter() - start, dtype=torch.float64), written() - before
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    calls = {STEP: lambda: step(0), CHECKED: lambda: step(1), REDUCE: lambda: dist.all_reduce(gradients)}
    times = in_turn({label: partial(timed, label, call) for label, call in calls.items()}, options.rounds)
    return {"seconds": times, "bytes_written": sent, "bytes_of_factors": sum(p.nbytes for p in case.factors)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each model."""
    lines = []
    for label, result in results.items():
        times, sent = result["seconds"], result["bytes_written"]
        check = statistics.median(b - a for a, b in zip(times[STEP], times[CHECKED], strict=True))
        sizes = [f"{x / 1e6:.1f}" for x in (result["bytes_of_factors"], sent[REDUCE])]
        seconds = [f"{1e3 * x:,.0f}" for x in (statistics.median(times[STEP]), check)]
        lines.append([label, *sizes, f"{(sent[CHECKED] - sent[STEP]) / 1e3:.1f}", *seconds])
    header = ["factors", "size, MB", "all-reduce sends, MB", "drift check sends, kB", "step, ms", "drift check, ms"]
    return markdown_table(header, lines, align="lr")


def main() -> None:
    """Measure, and on process 0 print a table and write all times."""
    (options,) = parse(Options)
    set_up(options.threads)
    dist.init_process_group("gloo")
    results = {
        f"{name}, {options.blocks} blocks, rank ratio {ratio:g}": measure(name, ratio, options)
        for name in options.models
        for ratio in options.rank_ratios
    }
    if dist.get_rank() == 0:
        launcher = f"python -m torch.distributed.run --standalone --nproc_per_node {dist.get_world_size()} "
        command = launcher + environment()["command"].replace("python -m", "--module", 1)
        path = write_record(options.output, {"results": results, "command": command}, options)
        print(f"{table(results)}\n\nwrote {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
